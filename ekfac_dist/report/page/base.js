// Helpers of all other files: DOM nodes, number formats, text with its invisible characters shown,
// the tooltip and the colours. Text from data reaches the page only as text nodes and attributes.

const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const grouped = new Intl.NumberFormat("en-US");
const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });

// A number with its sign and a given number of significant digits: +12.34, −0.00123, +1.2e−7.
function signed(value, digits = 4) {
  if (value === 0) return "0";
  return (value > 0 ? "+" : "−") + unsigned(Math.abs(value), digits);
}

function unsigned(size, digits = 4) {
  if (size === 0) return "0";
  const rounded = Number(size.toPrecision(digits));
  if (rounded >= 1e6 || rounded < 1e-3) {
    return size.toExponential(Math.max(0, digits - 2)).replace("e-", "e−").replace("e+", "e");
  }
  return rounded >= 10 ** (digits - 1) ? grouped.format(Math.round(size)) : size.toPrecision(digits);
}

const percent = (share) =>
  share > 0 && share < 1e-4 ? "< 0.01 %" : `${Number((100 * share).toPrecision(3))} %`;

// A share in percent with the sign of its score; a dash for null.
function signedShare(share) {
  if (share === null) return "–";
  const size = percent(Math.abs(share));
  return share === 0 || size.startsWith("<") ? size : `${share > 0 ? "+" : "−"}${size}`;
}

const plural = (number, word) => `${grouped.format(number)} ${word}${number === 1 ? "" : "s"}`;

// Characters that are invisible or reorder other text: line ends, tabs, controls, zero-width and
// bidirectional marks. Joiners stay, since writing systems and emoji need them.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/gu;

function markOf(character) {
  const code = character.codePointAt(0);
  if (code === 0x0a) return "↵";
  if (code === 0x09) return "→";
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

const KEPT = { "\n": "\n", "\t": "\t" }; // also written after their mark, to keep the layout

// Nodes of a text with marks for its invisible characters. With `inline`, line ends and tabs are
// replaced by their marks.
function visible(text, inline = false) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(make("span", { class: "mark", "aria-hidden": "true" }, markOf(match[0])));
    if (!inline && KEPT[match[0]]) nodes.push(KEPT[match[0]]);
    end = match.index + match[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

// The same as a string, for labels that screen readers speak.
const spelled = (text) =>
  text.trim() === "" && text !== ""
    ? text.replace(/ /g, "␣").replace(HIDDEN, markOf)
    : text.replace(HIDDEN, markOf);

// -- the tooltip: the page has one, beside the element under the pointer or keyboard focus ---------

const tooltip = {
  box: byId("tooltip"),
  place: null,

  // `place` returns the rectangle to stand beside, in window coordinates.
  show(place, ...content) {
    this.place = place;
    this.box.replaceChildren(...content);
    this.box.hidden = false;
    this.move();
  },

  move() {
    if (!this.place || this.box.hidden) return;
    const beside = this.place();
    if (!beside || beside.bottom < 0 || beside.top > innerHeight) {
      this.hide();
      return;
    }
    const own = this.box.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = beside.left + beside.width / 2 - own.width / 2;
    const above = beside.top - own.height - 8;
    this.box.style.left = `${Math.max(8, Math.min(left, width - own.width - 8))}px`;
    this.box.style.top = `${above >= 8 ? above : beside.bottom + 8}px`;
  },

  hide() {
    this.place = null;
    this.box.hidden = true;
  },
};

addEventListener("scroll", () => tooltip.move(), { capture: true, passive: true });

// The first `size` characters of a text, for the tooltip.
function brief(text, size = 60) {
  const characters = [...text.slice(0, 2 * size)];
  const cut = characters.length > size || text.length > 2 * size;
  return cut ? `${characters.slice(0, size).join("")}…` : text;
}

function facts(...pairs) {
  return pairs
    .filter((pair) => pair)
    .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
}

const say = (text) => {
  byId("live").textContent = text;
};

// -- colour: one hue for each sign, deeper for larger values, none at zero -------------------------

const colour = {
  root: false,
  depth(value, limit) {
    if (!limit) return 0;
    const part = Math.min(1, Math.abs(value) / limit);
    return this.root ? Math.sqrt(part) : part;
  },
  css(value, limit) {
    const depth = this.depth(value, limit);
    return depth < 0.004 ? "" : `rgb(var(--${value > 0 ? "plus" : "minus"}) / ${depth.toFixed(3)})`;
  },
  channels(name) {
    const text = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
    return text.trim().split(/\s+/).map(Number);
  },
  // The value whose colour has a given depth, from −1 to 1.
  valueAt(depth, limit) {
    return limit * (this.root ? depth * Math.abs(depth) : depth);
  },
};
