// The images of one request: pictures, bars and numbers, updated by the events of its stream.

import { Bars } from "./bars.js";
import { element, percent, seconds } from "./dom.js";
import { Picture, pngOf } from "./pictures.js";

class Card {
  constructor(set, index) {
    const { width, height, steps, layers } = set.shape;
    this.steps = 0;
    this.seed = String(BigInt(set.seed) + BigInt(index));
    this.picture = new Picture(width, height, `${set.title}, seed ${this.seed}: not drawn yet`);
    this.bars = new Bars(steps, layers);
    this.caption = element("figcaption", { textContent: `seed ${this.seed}` });
    const side = element("div", { className: "side" }, this.bars.root, this.caption);
    this.root = element("figure", {}, this.picture.canvas, side);
  }

  preview({ b64_json: png, adadiff }) {
    this.steps = adadiff.step;
    this.bars.show(adadiff.exit_layers);
    return this.picture.put(pngOf(png));
  }

  async finish({ b64_json: data, adadiff }, title) {
    this.details = adadiff;
    this.steps = adadiff.steps;
    this.bars.show(adadiff.exit_layers);
    if (adadiff.exit_layers_unconditional) this.bars.mark(adadiff.exit_layers_unconditional);
    const png = pngOf(data);
    const save = element("a", { textContent: "Save", href: URL.createObjectURL(png), download: `${this.seed}.png` });
    save.setAttribute("aria-label", `Save the picture of seed ${this.seed}`);
    const leftOut = `${percent(adadiff.share_left_out)} left out`;
    this.caption.replaceChildren(
      element("span", { textContent: `seed ${this.seed}` }),
      save,
      element("span", { className: "left-out", textContent: leftOut }),
    );
    await this.picture.put(png);
    this.picture.canvas.setAttribute("aria-label", `${title}, seed ${this.seed}`);
  }

  release() {
    const save = this.caption.querySelector("a");
    if (save) URL.revokeObjectURL(save.href);
  }
}

// shape: width, height, steps, layers. seed: text, of the first image.
export class PictureSet {
  constructor(title, shape, seed, count) {
    Object.assign(this, { title, shape, seed });
    this.began = performance.now();
    this.pending = [];
    this.cards = Array.from({ length: count }, (_, index) => new Card(this, index));
    this.numbers = element("dl", { className: "numbers" });
    const sheet = element("div", { className: count > 1 ? "sheet" : "single" }, ...this.cards.map((card) => card.root));
    this.root = element("article", { className: "set" }, element("h2", { textContent: title }), this.numbers, sheet);
    this.root.setAttribute("aria-busy", "true");
  }

  take(event) {
    const card = this.cards[event.adadiff.index];
    if (event.type === "image_generation.completed") this.pending.push(card.finish(event, this.title));
    else if (event.type === "image_generation.partial_image") this.pending.push(card.preview(event));
  }

  get progress() {
    return this.cards.reduce((sum, card) => sum + card.steps, 0) / (this.cards.length * this.shape.steps);
  }

  // Called when all images are done: waits for the pictures to be decoded, and shows the numbers.
  async finish() {
    const wall = (performance.now() - this.began) / 1000;
    await Promise.all(this.pending);
    const details = this.cards.map((card) => card.details);
    const mean = (name) => details.reduce((sum, one) => sum + one[name], 0) / details.length;
    const most = (name) => Math.max(...details.map((one) => one[name]));
    this.result = { running: most("seconds_running"), wall, leftOut: mean("share_left_out") };
    const waiting = most("seconds_waiting");
    this.#tell("drawing", seconds(this.result.running), "seconds of the service, from the queue to the last step");
    if (waiting >= 0.05) this.#tell("in the queue", seconds(waiting), "");
    this.#tell("wall clock", seconds(wall), "seconds by this browser's clock, from the request to the last picture");
    this.#tell("left out", percent(this.result.leftOut), "share of the network's blocks");
    this.#tell("mean exit", `${mean("mean_exit_layer").toFixed(1)} of ${this.shape.layers}`, "blocks");
    this.end();
  }

  end() {
    this.root.removeAttribute("aria-busy");
  }

  #tell(name, value, title) {
    this.numbers.append(
      element("div", { title }, element("dt", { textContent: name }), element("dd", { textContent: value })),
    );
  }

  release() {
    for (const card of this.cards) card.release();
  }
}
