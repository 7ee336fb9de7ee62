// What plots have in common: a frame with margins, and tooltips of what is under the pointer.

// An empty plot with margins for its labels.
function frame(width, height) {
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  const [left, top, bottom] = [38, 10, height - 22];
  return {
    svg,
    left,
    top,
    bottom,
    width: width - left - 14,
    height: bottom - top,
    grid(y, text) {
      svg.append(draw("path", { class: "grid", d: `M${left} ${y}H${width - 14}` }));
      svg.append(draw("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, text));
    },
    below(x, text) {
      svg.append(draw("text", { x, y: height - 6, "text-anchor": "middle" }, text));
    },
    place(id, label) {
      svg.setAttribute("aria-label", label);
      byId(id).replaceChildren(svg);
    },
  };
}

// Shows the tooltip `data-tip` of whatever the pointer is on inside an element.
function showTips(box) {
  box.addEventListener("pointerover", (event) => {
    const { tip } = event.target.dataset;
    if (tip) tooltip.show(() => event.target.getBoundingClientRect(), tip);
    else tooltip.hide();
  });
  box.addEventListener("pointerleave", () => tooltip.hide());
}
