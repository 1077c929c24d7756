"use strict";
// The values of a plot at the step under the pointer, or at the one that the arrow keys have reached.

for (const plot of document.querySelectorAll("[data-values]")) {
  const data = JSON.parse(plot.dataset.values);
  const figure = plot.parentElement;
  const svg = plot.querySelector("svg");
  const steps = [...new Set(data.curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  let current = -1;

  // What appears: a vertical line and a dot a curve in the drawing, and a box with the numbers beside it.
  const marks = svg.appendChild(document.createElementNS(svg.namespaceURI, "g"));
  marks.classList.add("marks");
  const box = figure.appendChild(document.createElement("div"));
  box.className = "values";
  box.setAttribute("role", "status");
  box.hidden = true;

  function nearest(sorted, value) {
    let best = 0;
    for (let i = 1; i < sorted.length; i++) {
      if (Math.abs(sorted[i] - value) < Math.abs(sorted[best] - value)) best = i;
    }
    return best;
  }

  function text(value) {
    const small = value !== 0 && Math.abs(value) < 1e-3;
    const digits = small ? value.toExponential(2) : value.toLocaleString("en-US", { maximumSignificantDigits: 5 });
    return digits.replace("-", "−");
  }

  function draw(tag, attributes) {
    const element = marks.appendChild(document.createElementNS(svg.namespaceURI, tag));
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  function line(css, ...parts) {
    const row = box.appendChild(document.createElement("div"));
    if (css) {
      const sample = row.appendChild(document.createElement("i"));
      sample.className = "line";
      sample.style.setProperty("--c", css);
    }
    for (const part of parts) row.appendChild(document.createElement("span")).textContent = part;
  }

  function show(index) {
    current = index;
    const step = steps[index];
    const x = data.x[0] + data.x[1] * step;
    const y = (value) => data.y[0] + data.y[1] * value;
    marks.replaceChildren();
    box.replaceChildren();
    draw("line", { x1: x, x2: x, y1: y(data.bottom), y2: y(data.top) });
    line("", `${data.over} ${text(step)}`);

    for (const curve of data.curves) {
      const i = nearest(curve.steps, step);
      const value = curve.values[i];
      const half = curve.halves.length ? ` ± ${text(curve.halves[i])}` : "";
      // A curve that has nothing at this step says which one it shows instead.
      const other = curve.steps[i] === step ? "" : ` at ${text(curve.steps[i])}`;
      line(curve.line, curve.name, `${text(value)}${half}${data.unit}${other}`);
      if (value >= data.bottom && value <= data.top) {
        const dot = draw("circle", { cx: data.x[0] + data.x[1] * curve.steps[i], cy: y(value), r: 3.5 });
        dot.style.setProperty("--c", curve.line.split(" ")[1]);
      }
    }

    // Beside the line, on the side that has room.
    box.hidden = false;
    const frame = figure.getBoundingClientRect();
    const at = new DOMPoint(x, 0).matrixTransform(svg.getScreenCTM()).x - frame.left;
    const left = at < frame.width / 2 ? at + 12 : at - 12 - box.offsetWidth;
    box.style.left = `${Math.max(0, Math.min(left, frame.width - box.offsetWidth))}px`;
    box.style.top = `${plot.offsetTop + 6}px`;
  }

  function hide() {
    current = -1;
    marks.replaceChildren();
    box.hidden = true;
  }

  function underPointer(event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    show(nearest(steps, (point.x - data.x[0]) / data.x[1]));
  }

  if (steps.length === 0) continue;
  plot.addEventListener("pointermove", underPointer);
  plot.addEventListener("pointerdown", underPointer);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const last = steps.length - 1;
    const target = {
      ArrowRight: Math.min(current + 1, last),
      ArrowLeft: current < 0 ? last : Math.max(current - 1, 0),
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === "Escape") hide();
    if (target === undefined) return;
    event.preventDefault();
    show(target);
  });
}
