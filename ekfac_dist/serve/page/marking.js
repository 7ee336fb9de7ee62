// The text that is asked about, in which the words to be explained can be marked: with the pointer, or
// with the arrow keys. What is before them becomes the prompt, they the completion, the rest is cut off.

const marking = {
  box: byId("words"),
  text: "",
  words: [], // [start, end] in the text
  picked: null, // [start, end] of what is selected
  anchor: -1, // the word that a selection by keys began with, and the one that it ends with
  head: -1,

  show(prompt, completion, rest) {
    const parts = [["prompt", prompt], ["completion", completion], ["rest", rest]];
    const whole = prompt + completion + rest;
    if (whole !== this.text) this.pick(null);
    this.text = whole;
    this.words = [];
    const nodes = [];
    let start = 0;
    for (const [kind, text] of parts) {
      for (const word of wordsOf(text)) {
        nodes.push(make("span",
          { class: `word ${kind}`, id: `word-${this.words.length}`, role: "option", "aria-selected": "false" },
          ...visible(word)));
        this.words.push([start, start + word.length]);
        start += word.length;
      }
    }
    this.box.replaceChildren(...nodes);
    byId("mark-part").hidden = whole === "";
    byId("rest-key").hidden = rest === "";
  },

  // Takes a part of the text as what would be explained; null: none.
  pick(range) {
    this.picked = range;
    if (range === null) this.anchor = this.head = -1;
    byId("mark").disabled = range === null;
    for (const [k, [start, end]] of this.words.entries()) {
      const within = range !== null && start < range[1] && end > range[0];
      this.box.children[k]?.setAttribute("aria-selected", String(within));
    }
  },

  // Picks the words from the anchor to the head, and shows them selected.
  pickWords() {
    const [first, last] = [this.anchor, this.head].sort((a, b) => a - b);
    const [from, to] = [this.box.children[first], this.box.children[last]];
    getSelection().setBaseAndExtent(from, 0, to, to.childNodes.length);
    this.pick([this.words[first][0], this.words[last][1]]);
    const active = this.box.children[this.head];
    this.box.setAttribute("aria-activedescendant", active.id);
    active.scrollIntoView({ block: "nearest" });
    say(`Selected: ${spelled(brief(this.text.slice(...this.picked), 120))}`);
  },

  // Picks what the pointer has selected. A space before the first word belongs to it, as it does in
  // models' tokens; one after the last does not.
  pickSelection() {
    const selection = getSelection();
    if (!selection.rangeCount || selection.isCollapsed) return;
    const range = selection.getRangeAt(0);
    if (!this.box.contains(range.startContainer) || !this.box.contains(range.endContainer)) return;
    let start = this.offset(range.startContainer, range.startOffset, 0);
    let end = this.offset(range.endContainer, range.endOffset, 1);
    while (end - 1 > start && this.text[end - 1] === " ") end -= 1;
    if (this.text[start] !== " " && this.text[start - 1] === " ") start -= 1;
    if (end > start) this.pick([start, end]);
  },

  // The place in the text of a place in the document. Within a word that has marks for invisible
  // characters it is the word's start (side 0) or end (side 1).
  offset(node, at, side) {
    if (node === this.box) {
      return at < this.words.length ? this.words[at][0] : this.text.length;
    }
    const word = (node.nodeType === Node.TEXT_NODE ? node.parentElement : node).closest(".word");
    const [start, end] = this.words[[...this.box.children].indexOf(word)];
    if (node.nodeType === Node.TEXT_NODE && word.childNodes.length === 1) return start + at;
    if (node === word && at === 0) return start;
    return side ? end : start;
  },

  move(step, extend) {
    const last = this.words.length - 1;
    const from = this.head < 0 ? this.firstWord() - (step > 0 ? 1 : 0) : this.head;
    this.head = Math.max(0, Math.min(last, from + step));
    if (!extend || this.anchor < 0) this.anchor = this.head;
    this.pickWords();
  },

  // The completion's first word; the first of all where there is no completion.
  firstWord() {
    return Math.max(0, [...this.box.children].findIndex((node) => node.classList.contains("completion")));
  },
};

// A text cut into words, each with the space before it; without spaces, as the language has words.
function wordsOf(text) {
  const words = [];
  let before = "";
  for (const { segment, isWordLike } of new Intl.Segmenter("en", { granularity: "word" }).segment(text)) {
    const glued = !isWordLike && words.length && before === "" && /^\S+$/u.test(segment);
    if (/^\s+$/u.test(segment)) before += segment;
    else if (glued) words[words.length - 1] += segment; // a sign that follows a word
    else {
      words.push(before + segment);
      before = "";
    }
  }
  return before === "" ? words : [...words, before];
}

document.addEventListener("selectionchange", () => {
  if (marking.anchor < 0 || document.activeElement !== marking.box) marking.pickSelection();
});
marking.box.addEventListener("pointerdown", () => marking.pick(null));
marking.box.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !marking.words.length) return;
  const moves = {
    ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity,
  };
  if (event.key in moves) marking.move(moves[event.key], event.shiftKey);
  else if (event.key === "Enter" && marking.picked) byId("mark").click();
  else if (event.key === "Escape") {
    getSelection().removeAllRanges();
    marking.pick(null);
  } else return;
  event.preventDefault();
});
