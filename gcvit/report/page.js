"use strict";

// Charts are kept in the colours of day; at night each is looked up here.
const night = new Map(Object.entries(JSON.parse(document.getElementById("night").textContent)));
const system = matchMedia("(prefers-color-scheme: dark)");
const isTouched = matchMedia("(pointer: coarse)").matches;
const root = document.documentElement;
const hiddenRuns = new Set();
const drawn = new Set();

function isNight() {
  return root.dataset.theme ? root.dataset.theme === "night" : system.matches;
}

function draw(plot) {
  const text = plot.parentElement.querySelector("script.figure").textContent;
  const atNight = isNight();
  const figure = JSON.parse(text, (key, value) => (atNight && night.has(value) ? night.get(value) : value));
  const traces = figure.data.filter((trace) => !hiddenRuns.has(trace.meta));
  if (plot.clientWidth < 420) {
    for (const name of Object.keys(figure.layout).filter((name) => name.startsWith("xaxis"))) {
      figure.layout[name].nticks = 5;
    }
  }
  if (isTouched) {
    figure.layout.dragmode = false; // a finger scrolls the page
  }
  drawn.add(plot);
  Plotly.react(plot, traces, figure.layout, { responsive: true, displayModeBar: false, doubleClick: "reset" });
}

function redraw() {
  drawn.forEach(draw);
}

// A chart is drawn when it comes near: a report of many evaluations opens at once.
const plots = [...document.querySelectorAll(".plot")];
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "600px" },
);
plots.forEach((plot) => watcher.observe(plot));
addEventListener("beforeprint", () => plots.filter((plot) => plot.checkVisibility() && !drawn.has(plot)).forEach(draw));

const button = document.getElementById("theme");
button.hidden = false;
button.addEventListener("click", () => {
  const next = { undefined: "day", day: "night", night: undefined }[root.dataset.theme];
  if (next) {
    root.dataset.theme = next;
  } else {
    delete root.dataset.theme;
  }
  button.textContent = `Theme: ${{ day: "light", night: "dark" }[next] ?? "system"}`;
  redraw();
});
system.addEventListener("change", redraw);

document.getElementById("runs")?.addEventListener("change", (event) => {
  if (event.target.checked) {
    hiddenRuns.delete(event.target.value);
  } else {
    hiddenRuns.add(event.target.value);
  }
  redraw();
});
