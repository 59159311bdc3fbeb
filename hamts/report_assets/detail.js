// The list of steps, one step in detail, and the table as a file.

const REASON_WORDS = {
  event: "an event is tagged here", action: "an action is tagged here", surprise: "the state predicted it badly",
  innovation: "its error is large for this column", learned: "the learned score asks for it",
  mix: "the mixed score asks for it", "": "no router asks for it",
};
const STATE_WORDS = {
  kept: "kept", pending: "in the window, not yet decided", below: "refused", evicted: "kept once, pushed out by newer ones",
  quota_full: "tagged and kept once, pushed out because the quota was full",
};

function fillSteps(it) {
  const body = $("steps").tBodies[0];
  const margin = (token) => it.tokens.score[token] - it.tokens.threshold[token];
  const order = [...listed].sort((a, b) => {
    const [one, other] = [it.tokens.worth[a], it.tokens.worth[b]];
    const known = Number(Number.isNaN(one)) - Number(Number.isNaN(other));
    return known || other - one || (margin(b) || 0) - (margin(a) || 0);
  });
  const rows = order.slice(0, MOST_ROWS).map((token) => stepRow(it, token));
  body.replaceChildren(...rows);
  $("count").textContent = order.length > MOST_ROWS
    ? `(${order.length}; the ${MOST_ROWS} worth most, the export has all)`
    : `(${order.length})`;
}

function stepRow(it, token) {
  const { tokens } = it;
  const mark = el("span", { className: "swatch" });
  mark.style.background = colourOf(reasonOf(it, token));
  const row = el("tr", { tabIndex: 0 },
    el("td", { textContent: timeText(it, tokens.start[token]) }),
    el("td", { textContent: data.channels[tokens.channel[token]].name }),
    el("td", {}, mark, reasonOf(it, token) || "none"),
    el("td", { textContent: stateOf(it, token).replace("_", " ") }),
    el("td", { className: "n", textContent: tokens.rank[token] < 0 ? "" : tokens.rank[token] }),
    el("td", { className: "n", textContent: Number.isNaN(tokens.worth[token]) ? "" : number(tokens.worth[token], 3) }));
  row.dataset.token = token;
  row.setAttribute("aria-selected", String(token === view.chosen));
  row.addEventListener("click", () => { choose(token, true); focusRow(token); });
  row.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(token, true);
      focusRow(token);
    }
    const next = event.key === "ArrowDown" ? row.nextElementSibling : event.key === "ArrowUp" ? row.previousElementSibling : null;
    if (next) { event.preventDefault(); next.focus(); }
  });
  return row;
}

function focusRow(token) {
  const row = $("steps").querySelector(`tr[data-token="${token}"]`);
  if (row) row.focus({ preventScroll: true });
}

function pairs(rows) {
  const list = el("dl", {});
  for (const [name, value] of rows) list.append(el("dt", { textContent: name }), el("dd", {}, value));
  return list;
}

function showDetail(it) {
  const place = $("detail");
  if (view.chosen === null || !it.tokens) {
    place.replaceChildren(el("h4", { textContent: "One step" }), el("p", {
      className: "note",
      textContent: "Choose a step: click one in the pictures or the list, or use the arrow keys.",
    }));
    return;
  }
  const token = view.chosen, { tokens } = it, channel = tokens.channel[token];
  const start = tokens.start[token], end = lastStep(it, token);
  const reason = reasonOf(it, token), state = stateOf(it, token), tag = it.tags[tokens.tag[token]];
  const layers = it.layerSets[tokens.layers[token]];
  const name = data.channels[channel].name;
  place.replaceChildren(
    el("h4", { textContent: `${name}, ${timeText(it, start)} to ${timeText(it, end)}` }),
    worthOf(it, token),
    pairs([
      ["status", STATE_WORDS[state]],
      ["why", reason === "" ? REASON_WORDS[""] : `${reason}: ${REASON_WORDS[reason] || "its score asks for it"}`],
      ["tags", tag || "none"],
      ["score", `${number(tokens.score[token])}, threshold ${number(tokens.threshold[token])}`],
      ["rank", tokens.rank[token] < 0 ? "not yet decided" : `${tokens.rank[token]} of ${it.count} by score above the threshold`],
      ["written", tokens.written[token] < 0 ? DASH : timeText(it, tokens.written[token])],
      ["evicted", tokens.evicted[token] < 0 ? DASH : timeText(it, tokens.evicted[token])],
      ["layers", layers.length ? layers.join(", ") : DASH],
      ["bytes", String(tokens.bytes[token])],
    ]),
    readsOf(it, token),
    valuesOf(it, channel, start, end),
    neighboursOf(it, token),
  );
}

function worthOf(it, token) {
  const { tokens } = it, worth = tokens.worth[token];
  const box = el("div", { className: "worth", id: "worth" });
  if (Number.isNaN(worth)) {
    const why = stateOf(it, token) === "kept"
      ? "not measured: it was not yet held at the last forecasts with an outcome, or asked less than others"
      : "only of what is kept";
    box.append(el("strong", { textContent: "Worth: " }), why);
    return box;
  }
  const change = tokens.change[token] === 1;
  const words = {
    helps: "helps: dropping it costs more than dropping random others",
    moves: "moves the forecast more than random others",
    nothing: "worth no more than any other",
    hurts: "hurts: forecasts are better without it",
  }[data.judgements[tokens.judgement[token]]];
  const random = Number.isNaN(tokens.random[token])
    ? "nothing else was held to compare with"
    : `random others ${number(tokens.random[token], 3)}, 90 % of them ${number(tokens.low[token], 3)} to ${number(tokens.high[token], 3)}`;
  box.append(
    el("strong", { textContent: `Worth: ${number(worth, 3)}` }),
    ` (${random}). ${words}.`,
    el("div", { className: "note", textContent: change
      ? "Mean absolute change of the median forecast without it, in units of the stream's scale; no outcome is known."
      : `Change of the quantile loss without it, in units of the stream's scale, mean over ${data.worthCutoffs} forecast${data.worthCutoffs === 1 ? "" : "s"}.` }),
  );
  return box;
}

function readsOf(it, token) {
  const box = el("div", {}, el("h4", { textContent: "What attended to it" }));
  const found = it.reads[token];
  if (!found) {
    box.append(el("p", { className: "note", textContent: "It is in no scratchpad, or was never read." }));
    return box;
  }
  const mean = it.tokens.read[token];
  if (!Number.isNaN(mean)) box.append(el("p", { textContent: `Mean share of attention of all later reads: ${(100 * mean).toPrecision(3)} %.` }));
  for (const [cut, share] of found.forecasts || []) {
    box.append(el("p", { className: "read-by", textContent: `The forecast after ${timeText(it, cut - 1)} gave it ${(100 * share).toPrecision(3)} % of its attention.` }));
  }
  if (found.by.length) {
    const most = found.by[0][2] || 1;
    const body = el("tbody", {});
    for (const [from, to, share] of found.by) {
      body.append(el("tr", {},
        el("td", { textContent: `${timeText(it, from)} to ${timeText(it, to)}` }),
        el("td", { className: "n", textContent: `${(100 * share).toPrecision(3)} %` }),
        el("td", {}, el("meter", { min: 0, max: most, value: share }))));
    }
    box.append(el("table", {}, el("caption", { textContent: "read most in" }), body));
  }
  return box;
}

function valuesOf(it, channel, start, end) {
  const values = it.values(channel), body = el("tbody", {});
  for (let step = start; step <= end; step++) {
    body.append(el("tr", {},
      el("td", { textContent: timeText(it, step) }),
      el("td", { className: "n", textContent: values ? valueText(channel, values[step]) : "not on this page" })));
  }
  return el("details", { open: end - start < 12 }, el("summary", { textContent: "Values" }), el("table", {}, body));
}

// Patches of the same column before and after, and the other columns of the same time.
function neighboursOf(it, token) {
  const { tokens } = it, start = tokens.start[token], channel = tokens.channel[token];
  const near = [];
  for (let other = 0; other < it.count; other++) {
    const apart = Math.abs(tokens.start[other] - start);
    const same = tokens.channel[other] === channel;
    if (other !== token && ((same && apart <= 2 * data.patchSteps) || (!same && apart === 0))) near.push(other);
  }
  const body = el("tbody", {});
  for (const other of near.slice(0, 24)) {
    const values = it.values(tokens.channel[other]);
    let sum = 0, known = 0;
    for (let step = tokens.start[other]; values && step <= lastStep(it, other); step++) {
      if (!Number.isNaN(values[step])) { sum += values[step]; known++; }
    }
    const plain = !data.channels[tokens.channel[other]].levels.length;
    body.append(el("tr", {},
      el("td", { textContent: timeText(it, tokens.start[other]) }),
      el("td", { textContent: data.channels[tokens.channel[other]].name }),
      el("td", { className: "n", textContent: known && plain ? number(sum / known) : DASH }),
      el("td", { className: "n", textContent: number(tokens.score[other], 3) }),
      el("td", { textContent: stateOf(it, other).replace("_", " ") })));
  }
  const head = el("thead", {}, el("tr", {}, ...["time", "column", "mean", "score", "status"].map((text) => el("th", { textContent: text }))));
  return el("details", {}, el("summary", { textContent: `Neighbours (${near.length})` }), el("div", { className: "scroll" }, el("table", {}, head, body)));
}

// --- CSV

function csvText(it, tokens) {
  const quoted = (value) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const plain = (value) => (value === null || Number.isNaN(value) ? "" : String(value));
  const names = ["unique_id", "channel", "start", "end", "reason", "tag", "status", "score", "threshold", "rank",
    "written_at", "evicted_at", "layers", "bytes", "read_mass", "worth", "worth_random", "worth_random_low",
    "worth_random_high", "worth_of", "judgement"];
  const lines = tokens.map((token) => {
    const t = it.tokens, when = (step) => (step < 0 ? "" : timeText(it, step));
    const measured = !Number.isNaN(t.worth[token]);
    return [it.id, data.channels[t.channel[token]].name, timeText(it, t.start[token]), timeText(it, lastStep(it, token)),
      reasonOf(it, token), it.tags[t.tag[token]], stateOf(it, token), plain(t.score[token]), plain(t.threshold[token]),
      t.rank[token] < 0 ? "" : String(t.rank[token]), when(t.written[token]), when(t.evicted[token]),
      it.layerSets[t.layers[token]].join(" "), String(t.bytes[token]), plain(t.read[token]), plain(t.worth[token]),
      plain(t.random[token]), plain(t.low[token]), plain(t.high[token]),
      measured ? (t.change[token] ? "median change" : "quantile loss") : "", data.judgements[t.judgement[token]],
    ].map(quoted).join(",");
  });
  return [names.join(","), ...lines].join("\r\n") + "\r\n";
}

function exportCsv() {
  const it = item();
  if (!it.tokens) return;
  const order = [...listed].sort((a, b) => it.tokens.start[a] - it.tokens.start[b] || a - b);
  const address = URL.createObjectURL(new Blob([csvText(it, order)], { type: "text/csv" }));
  const link = el("a", { href: address, download: "kept_steps.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
