// The question's form: its fields, the question that they make, and the address that a question has.

const REFINED_BY = { none: [], cg: ["iterations", "sequences"], astra: ["iterations"] };
const field = (name) => byId(`ask-${name}`);

const form = {
  box: byId("ask"),
  rest: "", // what was cut off after the marked words
  before: null, // the texts before the last marking

  texts() {
    return { prompt: field("prompt").value, completion: field("completion").value, rest: this.rest };
  },

  write({ prompt, completion, rest = "" }) {
    field("prompt").value = prompt;
    field("completion").value = completion;
    this.rest = rest;
    this.changed();
  },

  changed() {
    const { prompt, completion, rest } = this.texts();
    // A part of an answer is no answer, so that of a chat all is explained.
    if (this.isChat) marking.show("", "", "");
    else marking.show(prompt, completion, rest);
    byId("mark-undo").hidden = this.before === null;
  },

  // Explains only what is picked: what is before it is the prompt, what is after it is cut off.
  mark() {
    if (!marking.picked) return;
    const [start, end] = marking.picked;
    const { text } = marking;
    this.before = this.texts();
    this.write({ prompt: text.slice(0, start), completion: text.slice(start, end), rest: text.slice(end) });
    marking.pick(null);
    getSelection().removeAllRanges();
    say(`Explained will be only: ${spelled(brief(text.slice(start, end), 120))}`);
  },

  undo() {
    this.write(this.before);
    this.before = null;
    this.changed();
    marking.box.focus();
  },

  get isChat() {
    return field("chat").checked;
  },

  // What is asked, as the body of a request; what is as usual is left out. Lines end as they do in
  // most texts, however the browser's own field has them.
  question() {
    const { prompt, completion } = this.texts();
    const question = this.isChat ? { messages: chatOf(prompt, completion) } : { prompt, completion };
    if (field("against").value !== "") question.against = field("against").value;
    for (const name of ["top_k", "rescore"]) {
      if (field(name).value !== "") question[name] = Number(field(name).value);
    }
    const damping = this.damping();
    if (damping !== null) question.damping = damping;
    if (field("normalise").value !== "none") question.normalise = field("normalise").value;
    if (field("tokens").value !== "inputs") question.tokens = field("tokens").value;
    const method = field("refine").value;
    if (method !== "none") {
      question.refine = { method };
      for (const name of REFINED_BY[method]) {
        if (field(name).value !== "") question.refine[name] = Number(field(name).value);
      }
    }
    return question;
  },

  damping() {
    if (field("damping").value === "") return null;
    const value = Number(field("damping").value);
    const scale = field("scale").value;
    if (scale === "mean") return value;
    return scale === "absolute" ? { value, relative: false } : { value, relative: true, scale };
  },

  fill(question) {
    const { damping = null, refine = null } = question;
    this.before = null;
    field("against").value = question.against ?? "";
    for (const name of ["top_k", "rescore"]) field(name).value = question[name] ?? "";
    field("normalise").value = question.normalise ?? "none";
    field("tokens").value = question.tokens ?? "inputs";
    const parts = damping !== null && typeof damping === "object" ? damping : { value: damping };
    field("damping").value = parts.value ?? "";
    field("scale").value = parts.relative === false ? "absolute" : (parts.scale ?? "mean");
    field("refine").value = refine ? refine.method : "none";
    for (const name of ["iterations", "sequences"]) field(name).value = refine?.[name] ?? "";
    this.adapt();
    field("chat").checked = question.messages !== undefined;
    if (this.isChat) byId("chat-part").hidden = false; // the service says if it has no template
    const [prompt, completion] = this.isChat
      ? question.messages.map(({ content }) => content)
      : [question.prompt ?? "", question.completion];
    this.write({ prompt, completion });
    byId("ask-options").open = Object.keys(question)
      .some((name) => !["prompt", "completion", "against", "messages"].includes(name));
  },

  // Shows which fields the others leave a meaning.
  adapt() {
    const used = REFINED_BY[field("refine").value] || [];
    for (const name of ["iterations", "sequences"]) field(name).disabled = !used.includes(name);
    field("damping").required = field("scale").value !== "mean";
  },

  // Whether the fields make a question; says what is missing where they do not.
  check() {
    const missing = field("completion").value === "";
    field("completion").setAttribute("aria-invalid", String(missing));
    byId("ask-note").textContent = missing
      ? "There is nothing to explain yet: let the model go on from the prompt, or write what it should have said."
      : "";
    if (missing) {
      field("completion").focus();
      return false;
    }
    const wrong = this.box.querySelector("input:invalid");
    if (wrong) byId("ask-options").open = true;
    return this.box.reportValidity();
  },
};

// -- a question in the address: its JSON in UTF-8, as base64 whose letters need no escape ---------

function keyOf(question) {
  const bytes = new TextEncoder().encode(JSON.stringify(question));
  const letters = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return btoa(letters).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

// The question of a key; null for a key of none.
function questionOf(key) {
  try {
    const letters = atob(key.replace(/-/g, "+").replace(/_/g, "/"));
    const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
    const question = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    return typeof question?.completion === "string" || isChat(question?.messages) ? question : null;
  } catch {
    return null;
  }
}

// A prompt and its completion as a chat.
const chatOf = (prompt, completion) => [
  { role: "user", content: prompt },
  { role: "assistant", content: completion },
];

// Whether messages are such a chat, which the form has fields for.
const isChat = (messages) =>
  Array.isArray(messages) && messages.length === 2 &&
  ["user", "assistant"].every((role, k) =>
    messages[k]?.role === role && typeof messages[k].content === "string");

// -- the model goes on ------------------------------------------------------------------------------

const goingOn = {
  controller: null,

  async run() {
    if (this.controller) {
      this.controller.abort();
      return;
    }
    this.controller = new AbortController();
    this.tell("The model goes on …", "Stop");
    const { prompt, completion: written } = form.texts();
    const completion = form.isChat ? "" : written; // a chat's answer begins anew
    const [asked] = chatOf(prompt, completion);
    try {
      const body = form.isChat ? { messages: [asked] } : { prompt: prompt + completion };
      const said = await client.json("v1/complete", {
        method: "POST",
        body: { ...body, max_tokens: Number(field("length").value) },
        signal: this.controller.signal,
      });
      form.before = null;
      form.write({ prompt, completion: completion + said.text });
      const why = said.finish === "end" ? "and came to its end" : "and was stopped there";
      this.tell(`The model went on for ${plural(said.tokens.length, "token")}, ${why}.`);
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof Refusal)) throw error;
      this.tell(error.name === "AbortError" ? "Stopped." : error.message);
    } finally {
      this.controller = null;
      byId("go-on").textContent = "Let the model go on";
    }
  },

  tell(text, button = null) {
    byId("go-on-note").textContent = spelled(text);
    if (button) byId("go-on").textContent = button;
  },
};

field("prompt").addEventListener("input", () => form.changed());
field("chat").addEventListener("change", () => {
  form.rest = "";
  form.before = null;
  form.changed();
});
field("completion").addEventListener("input", () => {
  form.rest = "";
  form.before = null;
  field("completion").removeAttribute("aria-invalid");
  byId("ask-note").textContent = "";
  form.changed();
});
for (const name of ["refine", "scale"]) field(name).addEventListener("change", () => form.adapt());
byId("go-on").addEventListener("click", () => goingOn.run());
byId("mark").addEventListener("click", () => form.mark());
byId("mark-undo").addEventListener("click", () => form.undo());
