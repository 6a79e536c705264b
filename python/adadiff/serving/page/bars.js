// The exit layer of each step, as bars that grow from left to right while an image is drawn.

import { drawn, element } from "./dom.js";

const WIDTH = 0.84; // width of a bar, as a share of a step
const CLOSE = 60; // steps; with more, bars touch and are drawn without antialiasing

export class Bars {
  constructor(steps, layers) {
    Object.assign(this, { steps, layers, known: 0 });
    const box = { viewBox: `0 0 ${steps} ${layers}`, preserveAspectRatio: "none", role: "img" };
    if (steps > CLOSE) box["shape-rendering"] = "crispEdges";
    this.svg = drawn("svg", { ...box, class: "bars", "aria-label": "Blocks that ran at each step: none yet" });
    this.svg.append(drawn("rect", { class: "all", width: steps, height: layers }));
    this.root = element(
      "div",
      { className: "chart" },
      element("p", { className: "axis top", textContent: `${layers} blocks` }),
      this.svg,
      element(
        "p",
        { className: "axis" },
        element("span", { textContent: "step 1" }),
        element("span", { textContent: String(steps) }),
      ),
    );
  }

  // layers: of the first steps, including those that are shown already.
  show(layers) {
    for (; this.known < layers.length; this.known += 1) this.#add("ran", this.known, layers[this.known]);
    this.svg.setAttribute("aria-label", `Blocks that ran at each step: ${layers.join(", ")}`);
  }

  // Adds a line across each bar for the unconditional half of guidance.
  mark(layers) {
    layers.forEach((layer, step) => this.#add("mark", step, layer));
    this.root.append(element("p", { className: "axis legend", textContent: "the unconditional half of guidance" }));
  }

  #add(kind, step, layer) {
    const width = this.steps > CLOSE ? 1 : WIDTH;
    const bar = drawn("rect", {
      class: kind,
      x: step + (1 - width) / 2,
      y: this.layers - layer,
      width,
      height: kind === "mark" ? this.layers / 50 : layer,
      "data-layers": layer,
    });
    const half = kind === "mark" ? ", unconditional half" : "";
    bar.append(drawn("title", {}, `step ${step + 1}: ${layer} of ${this.layers} blocks${half}`));
    this.svg.append(bar);
  }
}
