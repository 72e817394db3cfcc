"use strict";
// The language comes from the address (#lang=en), else from the browser. Nothing is stored.
const asked = /(?:^#|&)lang=(zh|en)\b/.exec(location.hash);
const language = asked ? asked[1] : navigator.language.startsWith("zh") ? "zh" : "en";
for (const input of document.querySelectorAll(".language input")) {
  const code = input.id.slice(-2);
  const show = () => {
    if (!input.checked) return;
    document.documentElement.lang = code === "zh" ? "zh-Hans" : "en";
    document.title = document.documentElement.dataset[code];
  };
  input.checked = code === language;
  input.addEventListener("change", show);
  show();
}
// Values at the pointer: each legend entry holds the points of its curve.
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg.curves");
  if (!svg) continue;
  const keys = [...figure.querySelectorAll(".key")].map((key) => ({
    label: key.querySelector("b"),
    x: key.dataset.x.split(" ").map(Number),
    y: key.dataset.y.split(" "),
  }));
  const steps = keys.flatMap((key) => key.x);
  const cursor = svg.querySelector(".cursor");
  const [left, right, first, last] = [52, 468, Math.min(...steps), Math.max(...steps)];
  const nearest = (list, value) => list.reduce((best, x, i) => (Math.abs(x - value) < Math.abs(list[best] - value) ? i : best), 0);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const value = first + ((place - left) / (right - left)) * (last - first);
    const step = steps[nearest(steps, value)];
    const x = last > first ? left + ((step - first) / (last - first)) * (right - left) : (left + right) / 2;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    for (const key of keys) {
      const at = nearest(key.x, step);
      key.label.textContent = `${key.x[at]}: ${key.y[at]}`;
    }
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    for (const key of keys) key.label.textContent = "";
  });
}
