// The text of a query: prompt and completion, and what a contrast is against.

const SHOWN_MEMBERS = 3;
const cut = (text) => (text.length > 60 ? `${text.slice(0, 60)}…` : text);

// A query's text with a line about it; what a contrast is against has the same prompt.
function sideNodes(prompt, side, kind, start) {
  const { completion, tokens, is_label: isLabel, nats, split_token: split } = side;
  const labels = isLabel.filter((one) => one).length;
  const each = labels > 1 ? `, ${unsigned(nats / labels, 3)} for each` : "";
  return [
    make("div", { class: "quote", tabindex: "0", role: "group", "aria-label": start },
      prompt === "" ? null : make("span", { class: "prompt" }, ...visible(prompt)),
      make("span", { class: kind }, ...visible(completion))),
    make("p", { class: "note" },
      `${start}: ${plural(tokens.length, "token")}, ${grouped.format(labels)} of them predicted; ` +
      `−log p = ${unsigned(nats)}${each}.` +
      (split ? ` The token “${spelled(split)}” begins in the prompt, so it is not among them.` : "")),
  ];
}

// `name` is what a member is called: its line, or that it was asked.
function memberNode(member, name) {
  const { prompt, nats, against } = member;
  const nodes = sideNodes(prompt, member, "completion", name);
  if (against) {
    nodes.push(
      make("p", { class: "rather" }, "rather than"),
      ...sideNodes(prompt, against, "against", `${name}, against`),
      make("p", { class: "note" },
        `Scores are of the difference, log p(completion) − log p(against) = ${signed(against.nats - nats)}.`)
    );
  }
  return make("div", { class: "member" }, ...nodes);
}

function agreementText({ spearman, spearmanTop = null, overlap }) {
  return [
    spearman === null ? "" : `Rank correlation of the scan with exact scores, over ` +
      `sequences spread evenly: ${spearman.toFixed(3)}.`,
    spearmanTop === null ? "" : `Rank correlation of the index's scores with exact scores, among ` +
      `its first: ${spearmanTop.toFixed(3)}.`,
    overlap === null ? "" : `${percent(overlap)} of these lists stood in the scan's ` +
      `own lists, among what was scored again.`,
  ].filter(Boolean).join(" ");
}

function queryNodes(query, nameOf) {
  const members = query.members.map((member) => memberNode(member, nameOf(member)));
  const group = query.members.length > 1 || query.group !== null;
  const head = group
    ? `${query.group === null ? "A group" : `Group “${spelled(query.group)}”`}: the gradients of ` +
      `${grouped.format(query.members.length)} queries, summed`
    : null;
  const rest = members.slice(SHOWN_MEMBERS);
  const agreement = agreementText(query);
  return [
    make("h2", { class: "unseen" }, "Query"),
    head ? make("p", { class: "group" }, head) : "",
    ...members.slice(0, SHOWN_MEMBERS),
    rest.length
      ? make("details", {}, make("summary", {}, `${grouped.format(rest.length)} more`), ...rest)
      : "",
    make("p", { class: "key quiet" },
      make("span", { class: "prompt" }, "prompt"), " ",
      make("span", { class: "completion" }, "completion, whose likelihood is explained"),
      ...(query.members.some(({ against }) => against)
        ? [" ", make("span", { class: "against" }, "against, whose likelihood is subtracted")]
        : []),
      agreement ? ` · ${agreement}` : ""),
  ];
}
