// Forecasts: one item, one target, one moment.

const fan = { item: 0, target: 0, cut: 0 };

function forecastsOf(item) {
  return data.forecasts.filter((each) => each.item === item).sort((a, b) => b.cut - a.cut);
}

function startForecasts() {
  if (!data.forecasts.length) return;
  $("forecasts").hidden = false;
  fan.item = data.forecasts[0].item;
  $("f-target").replaceChildren(
    ...data.targets.map((channel, place) => el("option", { value: place, textContent: data.channels[channel].name })),
  );
  $("f-item").addEventListener("change", () => {
    const found = itemNumber($("f-item").value);
    $("f-note").textContent = found === null ? `There is no item "${$("f-item").value}" on this page.` : "";
    if (found === null) return;
    fan.item = found;
    showForecastItem();
    keepState();
  });
  $("f-target").addEventListener("change", () => { fan.target = Number($("f-target").value); drawForecast(); });
  $("f-cut").addEventListener("change", () => { fan.cut = Number($("f-cut").value); drawForecast(); });
}

function showForecastItem() {
  const own = forecastsOf(fan.item), item = openItem(fan.item);
  $("f-item").value = item.id;
  $("f-cut").replaceChildren(
    ...own.map((each, place) =>
      el("option", { value: place, textContent: timeText(item, each.cut - 1) + (each.y ? "" : " (the end)") })),
  );
  fan.cut = 0;
  if (!own.length) $("f-note").textContent = "This item has no forecast on this page.";
  drawForecast();
}

function drawForecast() {
  const canvas = $("c-forecast");
  const box = begin(canvas);
  const own = forecastsOf(fan.item)[fan.cut];
  if (!own) return;
  const item = openItem(fan.item), h = data.h, channel = data.targets[fan.target];
  const quantiles = unpack(own.q, "f4"), truth = own.y ? unpack(own.y, "f4") : null;
  const at = (step, level) => quantiles[(fan.target * h + step) * 5 + level];
  const history = item.values(channel);
  const from = own.cut - Math.min(own.cut, 4 * h), to = own.cut + h - 1;
  const all = [];
  for (let i = from; i < own.cut && history; i++) all.push(history[i]);
  for (let i = 0; i < h; i++) {
    all.push(at(i, 0), at(i, 4));
    if (truth) all.push(truth[fan.target * h + i]);
  }
  const range = extent(all, 0, all.length - 1) || [0, 1];
  const y = yAxis(box, range[0], range[1]);
  const x = xAxis(box, from, to, (step) => timeText(item, step));
  const { pen } = box;
  for (const [low, high, alpha] of [[0, 4, 0.18], [1, 3, 0.28]]) {
    pen.fillStyle = `rgba(86, 180, 233, ${alpha})`;
    pen.beginPath();
    for (let i = 0; i < h; i++) pen.lineTo(x(own.cut + i), y(at(i, low)));
    for (let i = h - 1; i >= 0; i--) pen.lineTo(x(own.cut + i), y(at(i, high)));
    pen.fill();
  }
  const shifted = (get) => Array.from({ length: own.cut + h }, (_, i) => (i < own.cut ? NaN : get(i - own.cut)));
  pen.strokeStyle = "#0072b2";
  pen.lineWidth = 1.6;
  trace(pen, shifted((i) => at(i, 2)), own.cut, to, x, y);
  pen.strokeStyle = "#333";
  pen.lineWidth = 1;
  if (history) trace(pen, history, from, own.cut - 1, x, y);
  if (truth) {
    pen.setLineDash([2, 2]);
    trace(pen, shifted((i) => truth[fan.target * h + i]), own.cut, to, x, y);
    pen.setLineDash([]);
  }
}
