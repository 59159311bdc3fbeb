// The state of the view in the address, and the start.

let restoring = true;

function keepState() {
  if (restoring) return;
  const it = item(), state = new URLSearchParams();
  state.set("item", it.id);
  if (view.channel >= 0) state.set("column", data.channels[view.channel].name);
  if (view.from > 0) state.set("from", view.from);
  if (view.to < it.n - 1) state.set("to", view.to);
  const off = [...$("reasons").querySelectorAll("input")].filter((box) => !box.checked).map((box) => box.value || "none");
  if (off.length) state.set("without", off.join(" "));
  state.set("status", [...view.states].join(" "));
  if (view.chosen !== null) state.set("step", view.chosen);
  if (view.shift !== 0) state.set("preview", view.shift);
  if (data.forecasts.length) state.set("forecast", data.items[fan.item].id);
  history.replaceState(null, "", `#${state}`);
}

function restoreState() {
  const state = new URLSearchParams(location.hash.slice(1));
  const shown = data.forecasts.length ? itemNumber(state.get("forecast") || "") : null;
  if (shown !== null) fan.item = shown;
  if ($("explorer").hidden) return;
  const number = itemNumber(state.get("item") || "");
  if (number !== null) chooseItem(number);
  const it = item(), channel = data.channels.findIndex((each) => each.name === state.get("column"));
  view.channel = state.has("item") && !state.has("column") ? -1 : channel >= 0 ? channel : view.channel;
  const whole = (name, otherwise) => {
    const given = Number(state.get(name) ?? NaN);
    return Number.isInteger(given) && given >= 0 && given < it.n ? given : otherwise;
  };
  view.from = whole("from", 0);
  view.to = whole("to", it.n - 1);
  for (const name of (state.get("without") || "").split(" ").filter(Boolean)) view.reasons.delete(name === "none" ? "" : name);
  if (state.has("status")) view.states = new Set(state.get("status").split(" ").filter((name) => SHOWN_STATES.includes(name)));
  const token = Number(state.get("step") ?? NaN);
  if (it.tokens && Number.isInteger(token) && token >= 0 && token < it.count) view.chosen = token;
  const shift = Number(state.get("preview"));
  if (Number.isFinite(shift) && Math.abs(shift) <= 1) view.shift = shift;
}

function drawAll() {
  if (!$("forecasts").hidden) drawForecast();
  if (!$("explorer").hidden) update();
}

fillItemNames();
startForecasts();
startExplorer();
view.channel = data.targets.length ? data.targets[0] : 0;
restoreState();
if (!$("forecasts").hidden) showForecastItem();
if (!$("explorer").hidden) update();
restoring = false;
let waiting = 0;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 100);
});
window.addEventListener("hashchange", () => {
  if (/^#part-/.test(location.hash)) return;
  restoring = true;
  restoreState();
  drawAll();
  restoring = false;
});
document.documentElement.dataset.ready = String(Math.round(performance.now()));
