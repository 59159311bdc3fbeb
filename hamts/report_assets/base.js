"use strict";
// What all parts of the page share. Text from the data only ever enters the page as text (textContent).

const data = JSON.parse(document.getElementById("report-data").textContent);
const $ = (id) => document.getElementById(id);
const DASH = "–";

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  for (const child of children) node.append(child);
  return node;
}

// --- arrays

const KINDS = { f4: Float32Array, f8: Float64Array, i4: Int32Array, u2: Uint16Array, u1: Uint8Array };

function unpack(text, kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new KINDS[kind](bytes.buffer);
}

const TOKEN_KINDS = {
  start: "i4", channel: "u2", score: "f4", threshold: "f4", status: "u1", reason: "u1", tag: "u2", layers: "u2",
  rank: "i4", observed: "u2", read: "f4", written: "i4", evicted: "i4", worth: "f4", bytes: "i4", random: "f4",
  low: "f4", high: "f4", judgement: "u1", change: "u1",
};

// An item's arrays are unpacked when it is first looked at.
const opened = new Map();
function openItem(number) {
  if (opened.has(number)) return opened.get(number);
  const raw = data.items[number];
  const item = { number, id: raw.id, n: raw.n, times: raw.clock.t ? unpack(raw.clock.t, "f8") : null, clock: raw.clock };
  const values = new Map();
  item.values = (channel) => {
    if (!values.has(channel)) {
      values.set(channel, raw.values[channel] === undefined ? null : unpack(raw.values[channel], "f4"));
    }
    return values.get(channel);
  };
  item.tokens = null;
  if (raw.tokens) {
    item.tokens = {};
    for (const [name, kind] of Object.entries(TOKEN_KINDS)) item.tokens[name] = unpack(raw.tokens[name], kind);
    item.count = item.tokens.start.length;
    item.tags = raw.tags;
    item.reasons = raw.reasons;
    item.layerSets = raw.layerSets;
    item.reads = raw.reads;
    item.held = { step: unpack(raw.held.step, "i4"), count: unpack(raw.held.count, "i4") };
  }
  opened.set(number, item);
  return item;
}

// --- times

const zoned = data.zone && !data.integer
  ? new Intl.DateTimeFormat("sv-SE", {
      timeZone: data.zone, year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit",
      second: "2-digit",
    })
  : null;

function stampOf(item, step) {
  return item.times ? (step < item.n ? item.times[step] : item.times[item.n - 1]) : item.clock.t0 + step * item.clock.dt;
}

function timeText(item, step) {
  const stamp = stampOf(item, step);
  if (data.integer) return String(stamp);
  const text = zoned ? zoned.format(stamp) : new Date(stamp).toISOString().slice(0, 19).replace("T", " ");
  return text.endsWith(":00") ? text.slice(0, 16) : text;
}

// First step at or after a time as text; times as text sort as times do.
function stepAt(item, text) {
  const wanted = data.integer ? Number(text) : text.trim().replace("T", " ");
  if (data.integer ? Number.isNaN(wanted) : !/^\d{4}(-\d\d(-\d\d( \d\d(:\d\d(:\d\d)?)?)?)?)?$/.test(wanted)) return null;
  let low = 0, high = item.n;
  while (low < high) {
    const middle = (low + high) >> 1;
    const reached = data.integer ? stampOf(item, middle) >= wanted : timeText(item, middle) >= wanted;
    if (reached) high = middle;
    else low = middle + 1;
  }
  return Math.min(low, item.n - 1);
}

function number(value, digits = 4) {
  return value === null || Number.isNaN(value) ? DASH : Number(value.toPrecision(digits)).toString();
}

function valueText(channel, value) {
  if (Number.isNaN(value)) return "missing";
  const levels = data.channels[channel].levels;
  if (levels.length) return levels[value - 1] === undefined ? "(unseen)" : levels[value - 1];
  return number(value, 6);
}

// --- canvases

const PAD = { left: 62, right: 14, top: 6, bottom: 20 };

function begin(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = Number(canvas.getAttribute("height"));
  if (!canvas.dataset.height) canvas.dataset.height = height;
  const tall = Number(canvas.dataset.height);
  canvas.style.height = tall + "px";
  canvas.width = Math.max(Math.round(width * ratio), 1);
  canvas.height = Math.round(tall * ratio);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, tall);
  pen.font = "12px system-ui, sans-serif";
  return { pen, width, height: tall, left: PAD.left, right: width - PAD.right, top: PAD.top, bottom: tall - PAD.bottom };
}

function niceTicks(low, high, most) {
  const raw = (high - low) / Math.max(most, 1);
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * size).find((each) => each >= raw) || size;
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return ticks;
}

function yAxis(box, low, high, ticks) {
  const { pen } = box;
  const y = (value) => box.bottom - ((value - low) / (high - low || 1)) * (box.bottom - box.top);
  pen.fillStyle = "#555";
  pen.strokeStyle = "#eee";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const tick of ticks || niceTicks(low, high, Math.max((box.bottom - box.top) / 32, 2))) {
    pen.beginPath();
    pen.moveTo(box.left, y(tick));
    pen.lineTo(box.right, y(tick));
    pen.stroke();
    pen.fillText(number(tick, 5), box.left - 5, y(tick));
  }
  return y;
}

function xAxis(box, from, to, textOf) {
  const { pen } = box;
  const x = (step) => box.left + ((step - from) / Math.max(to - from, 1)) * (box.right - box.left);
  pen.fillStyle = "#555";
  pen.strokeStyle = "#999";
  pen.textBaseline = "top";
  pen.beginPath();
  pen.moveTo(box.left, box.bottom + 0.5);
  pen.lineTo(box.right, box.bottom + 0.5);
  pen.stroke();
  const count = Math.max(Math.min(Math.floor((box.right - box.left) / 200), to - from), 1);
  for (let i = 0; i <= count; i++) {
    const step = Math.round(from + (i * (to - from)) / count);
    pen.textAlign = i === 0 ? "left" : i === count ? "right" : "center";
    pen.fillText(textOf(step), x(step), box.bottom + 4);
  }
  return x;
}

// Lowest and highest value of values[from..to], so that no spike is lost.
function extent(values, from, to) {
  let low = Infinity, high = -Infinity;
  for (let i = Math.max(from, 0); i <= Math.min(to, values.length - 1); i++) {
    const value = values[i];
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (!(low <= high)) return null;
  if (low === high) return [low - 1, high + 1];
  const room = 0.06 * (high - low);
  return [low - room, high + room];
}

// A line through values[i] at place(i): of each column of pixels its lowest and its highest; gaps stay gaps.
function trace(pen, values, from, to, x, y) {
  const dense = (to - from + 1) / Math.max(x(to) - x(from), 1) > 2;
  pen.beginPath();
  let down = false, column = NaN, low = 0, high = 0, last = 0;
  const flush = () => {
    if (Number.isNaN(column)) return;
    if (down) pen.lineTo(column, y(low));
    else pen.moveTo(column, y(low));
    if (high !== low) pen.lineTo(column, y(high));
    if (last !== high) pen.lineTo(column, y(last));
    down = true;
    column = NaN;
  };
  for (let i = Math.max(from, 0); i <= Math.min(to, values.length - 1); i++) {
    const value = values[i];
    if (Number.isNaN(value)) {
      flush();
      down = false;
      continue;
    }
    const at = dense ? Math.round(x(i)) : x(i);
    if (!dense) {
      if (down) pen.lineTo(at, y(value));
      else {
        pen.moveTo(at, y(value));
        // a value between two gaps is a dot
        pen.lineTo(at + 0.6, y(value));
      }
      down = true;
    } else if (at === column) {
      if (value < low) low = value;
      if (value > high) high = value;
      last = value;
    } else {
      flush();
      column = at;
      low = high = last = value;
    }
  }
  flush();
  pen.stroke();
}

function fillItemNames() {
  $("item-names").replaceChildren(...data.items.map((item) => el("option", { value: item.id })));
}

function itemNumber(text) {
  const found = data.items.findIndex((item) => item.id === text);
  return found < 0 ? null : found;
}
