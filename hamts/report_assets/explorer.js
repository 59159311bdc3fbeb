// The explorer: linked pictures of one item, filters, a list of steps, and a preview of another threshold.

const view = { item: 0, channel: 0, from: 0, to: 0, reasons: null, states: new Set(), chosen: null, shift: 0 };
const SHOWN_STATES = ["kept", "pending", "evicted", "quota_full", "below"];
const MOST_ROWS = 400;
let listed = [];

const item = () => openItem(view.item);
const reasonOf = (it, token) => it.reasons[it.tokens.reason[token]];
const stateOf = (it, token) => data.statuses[it.tokens.status[token]];
const colourOf = (reason) => data.colours[reason] || data.colours[""];
const lastStep = (it, token) => Math.min(it.tokens.start[token] + patchSteps(it, token) - 1, it.n - 1);

// The first patch of an item may be cut short by the calendar it is aligned to.
function patchSteps(it, token) {
  if (it.tokens.start[token] > 0) return data.patchSteps;
  if (it.firstPatch === undefined) {
    it.firstPatch = data.patchSteps;
    for (let i = 0; i < it.count; i++) {
      const start = it.tokens.start[i];
      if (start > 0) it.firstPatch = Math.min(it.firstPatch, start % data.patchSteps || data.patchSteps);
    }
  }
  return it.firstPatch;
}

function passes(it, token) {
  return (
    view.reasons.has(reasonOf(it, token)) && view.states.has(stateOf(it, token)) &&
    it.tokens.start[token] <= view.to && lastStep(it, token) >= view.from
  );
}

function startExplorer() {
  if (!data.items.some((each) => each.tokens)) return;
  $("explorer").hidden = false;
  $("channel").append(el("option", { value: -1, textContent: "all columns" }));
  data.channels.forEach((each, place) =>
    $("channel").append(el("option", { value: place, textContent: `${each.name} (${each.role})` })));
  const reasons = [...new Set(data.items.flatMap((each) => each.reasons || []))].sort();
  view.reasons = new Set(reasons);
  view.states = new Set(["kept", "evicted", "quota_full"]);
  boxes($("reasons"), reasons, view.reasons, (name) => (name === "" ? "none" : name), true);
  boxes($("states"), SHOWN_STATES, view.states, (name) => name.replace("_", " "), false);
  $("item").addEventListener("change", () => {
    const found = itemNumber($("item").value);
    if (found === null) {
      $("message").textContent = `There is no item "${$("item").value}" on this page.`;
      return;
    }
    chooseItem(found);
    update();
  });
  $("channel").addEventListener("change", () => { view.channel = Number($("channel").value); update(); });
  for (const name of ["from", "to"]) $(name).addEventListener("change", () => timeGiven(name));
  $("zoom-in").addEventListener("click", () => zoom(0.5));
  $("zoom-out").addEventListener("click", () => zoom(2));
  $("all").addEventListener("click", () => { view.from = 0; view.to = item().n - 1; update(); });
  $("csv").addEventListener("click", exportCsv);
  $("shift").addEventListener("input", () => { view.shift = Number($("shift").value) / 100; update(); });
  $("shift-reset").addEventListener("click", () => { view.shift = 0; update(); });
  for (const id of ["c-series", "c-scores"]) $(id).addEventListener("click", clicked);
  $("c-series").addEventListener("keydown", keyed);
  for (const id of ["c-series", "c-scores", "c-layers", "c-held"]) dragged($(id));
  chooseItem(data.items.findIndex((each) => each.tokens));
}

function boxes(parent, names, chosen, text, swatch) {
  for (const name of names) {
    const box = el("input", { type: "checkbox", checked: chosen.has(name), value: name });
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(name);
      else chosen.delete(name);
      update();
    });
    const label = el("label", {}, box);
    if (swatch) {
      const mark = el("span", { className: "swatch" });
      mark.style.background = colourOf(name);
      label.append(mark);
    }
    label.append(text(name));
    parent.append(label);
  }
}

function chooseItem(number) {
  const before = opened.has(view.item) ? item().n : 0;
  const whole = view.from === 0 && view.to >= before - 1;
  view.item = number;
  view.chosen = null;
  const it = item();
  if (whole || view.from >= it.n) view.from = 0;
  if (whole || view.to >= it.n) view.to = it.n - 1;
  if (!it.tokens) $("message").textContent = "Nothing could be kept of this item: it is too short.";
}

function timeGiven(name) {
  const it = item(), step = stepAt(it, $(name).value);
  if (step === null) {
    $("message").textContent = `"${$(name).value}" is no time such as ${timeText(it, 0)}.`;
    return;
  }
  view[name] = step;
  if (view.from > view.to) [view.from, view.to] = [view.to, view.from];
  update();
}

function zoom(factor, middle) {
  const it = item(), size = Math.max(Math.round((view.to - view.from) * factor), data.patchSteps);
  const at = middle === undefined ? centre() : middle;
  view.from = Math.max(Math.round(at - size / 2), 0);
  view.to = Math.min(view.from + size, it.n - 1);
  view.from = Math.max(Math.min(view.from, view.to - size), 0);
  update();
}

function centre() {
  const it = item();
  if (view.chosen !== null) {
    const start = it.tokens.start[view.chosen];
    if (start >= view.from && start <= view.to) return start;
  }
  return (view.from + view.to) / 2;
}

// --- choosing a step

function choose(token, bring) {
  view.chosen = token;
  const it = item();
  if (token !== null && bring && (it.tokens.start[token] < view.from || lastStep(it, token) > view.to)) {
    const half = Math.round((view.to - view.from) / 2);
    view.from = Math.max(it.tokens.start[token] - half, 0);
    view.to = Math.min(view.from + 2 * half, it.n - 1);
  }
  update();
}

function clicked(event) {
  const it = item();
  if (!it.tokens) return;
  const box = event.currentTarget.getBoundingClientRect();
  const left = PAD.left, right = box.width - PAD.right;
  const step = view.from + ((event.clientX - box.left - left) / (right - left)) * (view.to - view.from);
  let best = null, distance = Infinity;
  for (const token of listed) {
    const start = it.tokens.start[token], end = lastStep(it, token);
    const apart = step < start ? start - step : step > end ? step - end : 0;
    const own = view.channel < 0 || it.tokens.channel[token] === view.channel ? 0 : 0.5;
    if (apart + own < distance) { distance = apart + own; best = token; }
  }
  // a finger's width
  if (best !== null && (distance / Math.max(view.to - view.from, 1)) * (right - left) < 14) choose(best, false);
  else $("message").textContent = "No step that passes the filters lies there.";
}

function keyed(event) {
  if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
    event.preventDefault();
    const it = item();
    const order = [...listed].sort((a, b) => it.tokens.start[a] - it.tokens.start[b] || a - b);
    if (!order.length) return;
    const place = order.indexOf(view.chosen), forward = event.key === "ArrowRight";
    const next = place < 0 ? (forward ? 0 : order.length - 1) : place + (forward ? 1 : -1);
    choose(order[Math.max(Math.min(next, order.length - 1), 0)], true);
  } else if (event.key === "+" || event.key === "=") zoom(0.5);
  else if (event.key === "-") zoom(2);
}

// Dragging across a picture chooses a stretch of time.
function dragged(canvas) {
  let start = null;
  const stepOf = (event) => {
    const box = canvas.getBoundingClientRect();
    const share = (event.clientX - box.left - PAD.left) / (box.width - PAD.left - PAD.right);
    return view.from + Math.min(Math.max(share, 0), 1) * (view.to - view.from);
  };
  canvas.addEventListener("pointerdown", (event) => { start = [event.clientX, stepOf(event)]; });
  canvas.addEventListener("pointerup", (event) => {
    if (start !== null && Math.abs(event.clientX - start[0]) > 8) {
      const [a, b] = [start[1], stepOf(event)].sort((one, other) => one - other);
      if (b - a >= 1) { view.from = Math.round(a); view.to = Math.round(b); update(); }
    }
    start = null;
  });
}

// --- drawing

function update() {
  const it = item();
  $("item").value = it.id;
  $("channel").value = String(view.channel);
  $("from").value = timeText(it, view.from);
  $("to").value = timeText(it, view.to);
  $("shift").value = String(Math.round(view.shift * 100));
  for (const [box, chosen] of [["reasons", view.reasons], ["states", view.states]]) {
    for (const each of $(box).querySelectorAll("input")) each.checked = chosen.has(each.value);
  }
  listed = [];
  for (let token = 0; it.tokens && token < it.count; token++) {
    if ((view.channel < 0 || it.tokens.channel[token] === view.channel) && passes(it, token)) listed.push(token);
  }
  $("message").textContent = it.tokens
    ? listed.length ? "" : "No step passes the filters."
    : "Nothing could be kept of this item: it is too short.";
  drawSeries(it);
  drawScores(it);
  drawLayers(it);
  drawHeld(it);
  fillSteps(it);
  showPreview(it);
  showDetail(it);
  keepState();
}

const axisText = (it) => (step) => timeText(it, step);
const drawnChannel = () => (view.channel >= 0 ? view.channel : data.targets[0]);

function drawSeries(it) {
  const box = begin($("c-series")), { pen } = box, values = it.values(drawnChannel());
  const range = (values && extent(values, view.from, view.to)) || [0, 1];
  const y = yAxis(box, range[0], range[1]);
  const x = xAxis(box, view.from, view.to, axisText(it));
  pen.save();
  pen.beginPath();
  pen.rect(box.left, 0, box.right - box.left, box.bottom + 1);
  pen.clip();
  const wide = (first, last) => [x(first - 0.5), Math.max(x(last + 0.5) - x(first - 0.5), 1.5)];
  pen.fillStyle = "rgba(240, 228, 66, 0.40)";
  for (const [number, first, last] of data.labels) {
    if (number === view.item) { const [at, size] = wide(first, last); pen.fillRect(at, box.top, size, box.bottom - box.top); }
  }
  if (it.tokens) {
    pen.fillStyle = "rgba(240, 228, 66, 0.55)";
    let drawn = -1;
    for (let token = 0; token < it.count; token++) {
      const start = it.tokens.start[token];
      if (start === drawn || !it.tags[it.tokens.tag[token]]) continue;
      drawn = start;
      if (start > view.to || start + data.patchSteps < view.from) continue;
      const [at, size] = wide(start, lastStep(it, token));
      pen.fillRect(at, box.top, size, 7);
    }
  }
  pen.strokeStyle = "#9a9a9a";
  pen.lineWidth = 1;
  if (values) trace(pen, values, view.from - 1, view.to + 1, x, y);
  else {
    pen.fillStyle = "#555";
    pen.textAlign = "left";
    pen.fillText("The values of this column are not on this page.", box.left + 6, box.top + 14);
  }
  if (values && !extent(values, 0, values.length - 1)) {
    pen.fillStyle = "#555";
    pen.textAlign = "left";
    pen.fillText("No value of this column was ever observed.", box.left + 6, box.top + 14);
  }
  for (const token of listed) {
    const start = it.tokens.start[token], end = lastStep(it, token);
    pen.fillStyle = pen.strokeStyle = colourOf(reasonOf(it, token));
    const [at, size] = wide(start, end);
    pen.globalAlpha = stateOf(it, token) === "kept" ? 1 : 0.4;
    pen.fillRect(at, box.bottom - 6, size, 6);
    if (values && it.tokens.channel[token] === drawnChannel() && listed.length < 4000) {
      pen.lineWidth = 2;
      trace(pen, values, start, end, x, y);
    }
    pen.globalAlpha = 1;
  }
  markChosen(box, it, x);
  pen.restore();
}

function markChosen(box, it, x) {
  if (view.chosen === null) return;
  const start = it.tokens.start[view.chosen], { pen } = box;
  pen.strokeStyle = "#000";
  pen.lineWidth = 1.5;
  pen.setLineDash([4, 3]);
  pen.strokeRect(x(start - 0.5), box.top + 1, Math.max(x(lastStep(it, view.chosen) + 0.5) - x(start - 0.5), 3), box.bottom - box.top - 2);
  pen.setLineDash([]);
}

function drawScores(it) {
  const box = begin($("c-scores")), { pen } = box;
  if (!it.tokens) return;
  const middle = [], score = [], threshold = [];
  const channel = drawnChannel();
  for (let token = 0; token < it.count; token++) {
    if (it.tokens.channel[token] !== channel) continue;
    const at = (it.tokens.start[token] + lastStep(it, token)) / 2;
    if (at < view.from - data.patchSteps || at > view.to + data.patchSteps) continue;
    middle.push(at);
    score.push(it.tokens.score[token]);
    threshold.push(it.tokens.threshold[token]);
  }
  const finite = [...score, ...threshold.map((each) => each + shiftOf(it)), ...threshold].filter(Number.isFinite);
  const range = extent(finite, 0, finite.length - 1);
  const x = xAxis(box, view.from, view.to, axisText(it));
  if (!range) {
    pen.fillStyle = "#555";
    pen.textAlign = "left";
    pen.fillText("No router scores this column: tags alone decide.", box.left + 6, box.top + 10);
    return;
  }
  const y = yAxis(box, range[0], range[1]);
  pen.save();
  pen.beginPath();
  pen.rect(box.left, 0, box.right - box.left, box.bottom + 1);
  pen.clip();
  const line = (numbers, style, dash) => {
    pen.strokeStyle = style;
    pen.setLineDash(dash);
    pen.lineWidth = 1;
    trace(pen, numbers, 0, numbers.length - 1, (i) => x(middle[i]), y);
    pen.setLineDash([]);
  };
  line(score, "#9a9a9a", []);
  line(threshold, "#000", [5, 3]);
  if (view.shift !== 0) line(threshold.map((each) => each + shiftOf(it)), "#d55e00", [2, 3]);
  for (const token of listed) {
    if (it.tokens.channel[token] !== channel || !Number.isFinite(it.tokens.score[token])) continue;
    pen.fillStyle = colourOf(reasonOf(it, token));
    pen.globalAlpha = stateOf(it, token) === "kept" ? 1 : 0.4;
    pen.beginPath();
    pen.arc(x((it.tokens.start[token] + lastStep(it, token)) / 2), y(it.tokens.score[token]), 3, 0, 7);
    pen.fill();
    pen.globalAlpha = 1;
  }
  markChosen(box, it, x);
  pen.restore();
}

function drawLayers(it) {
  const canvas = $("c-layers");
  canvas.dataset.height = 24 + 18 * data.layers;
  const box = begin(canvas), { pen } = box;
  xAxis(box, view.from, view.to, axisText(it));
  if (!it.tokens) return;
  const bins = Math.max(Math.min(Math.floor((box.right - box.left) / 4), Math.ceil((view.to - view.from + 1) / data.patchSteps)), 1);
  const total = new Float64Array(bins), kept = Array.from({ length: data.layers }, () => new Float64Array(bins));
  for (let token = 0; token < it.count; token++) {
    const place = Math.floor(((it.tokens.start[token] - view.from) / Math.max(view.to - view.from + 1, 1)) * bins);
    if (place < 0 || place >= bins) continue;
    total[place]++;
    if (stateOf(it, token) === "kept") for (const layer of it.layerSets[it.tokens.layers[token]]) kept[layer][place]++;
  }
  const most = Math.max(...kept.flatMap((row) => [...row].map((each, i) => (total[i] ? each / total[i] : 0))), 0.01);
  const size = (box.bottom - box.top) / data.layers, wide = (box.right - box.left) / bins;
  kept.forEach((row, layer) => {
    pen.fillStyle = "#555";
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillText(`layer ${layer}`, box.left - 5, box.top + (layer + 0.5) * size);
    row.forEach((each, i) => {
      if (!total[i]) return;
      const share = each / total[i] / most;
      // from the pale to the dark end of one blue: read without telling hues apart
      pen.fillStyle = `rgb(${Math.round(240 - 240 * share)}, ${Math.round(245 - 175 * share)}, ${Math.round(250 - 120 * share)})`;
      pen.fillRect(box.left + i * wide, box.top + layer * size, wide + 0.5, size - 1);
    });
  });
  canvas.setAttribute("aria-label", `Share of tokens kept by layer over time, darkest ${number(100 * most, 3)} %`);
}

function drawHeld(it) {
  const box = begin($("c-held")), { pen } = box;
  if (!it.tokens) return;
  const { step, count } = it.held;
  let most = 1;
  for (const each of count) most = Math.max(most, each);
  const y = yAxis(box, 0, most * 1.08);
  const x = xAxis(box, view.from, view.to, axisText(it));
  pen.save();
  pen.beginPath();
  pen.rect(box.left, 0, box.right - box.left, box.bottom + 1);
  pen.clip();
  pen.strokeStyle = "#0072b2";
  pen.lineWidth = 1.5;
  pen.beginPath();
  pen.moveTo(x(0), y(0));
  for (let i = 0; i < step.length; i++) {
    pen.lineTo(x(step[i]), y(i ? count[i - 1] : 0));
    pen.lineTo(x(step[i]), y(count[i]));
  }
  pen.lineTo(x(it.n - 1), y(step.length ? count[step.length - 1] : 0));
  pen.stroke();
  pen.restore();
}

// --- preview of another threshold

// The slider goes as far as most scores lie apart.
function shiftOf(it) {
  if (it.unit === undefined) {
    const known = Array.from(it.tokens.score).filter(Number.isFinite).sort((a, b) => a - b);
    const at = (share) => known[Math.floor(share * (known.length - 1))];
    it.unit = known.length ? at(0.99) - at(0.1) || 1 : 1;
  }
  return view.shift * it.unit;
}

function showPreview(it) {
  if (!it.tokens) return;
  const { score, threshold, status } = it.tokens, shift = shiftOf(it);
  let now = 0, then = 0, decided = 0;
  for (let token = 0; token < it.count; token++) {
    if (data.statuses[status[token]] === "pending" || !Number.isFinite(score[token])) continue;
    decided++;
    now += score[token] >= threshold[token];
    then += score[token] >= threshold[token] + shift;
  }
  const share = (count) => `${((100 * count) / Math.max(decided, 1)).toFixed(1)} %`;
  $("preview").textContent = !decided
    ? "no scores"
    : view.shift === 0
      ? `as it is: ${share(now)} of the scored tokens lie above their threshold`
      : `threshold ${shift > 0 ? "+" : "−"}${number(Math.abs(shift))}: ${share(then)} would lie above it, instead of ${share(now)}`;
}
