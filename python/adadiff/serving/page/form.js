// The form: fields that a model takes, the body of a request, the fragment of the address, and error messages.

import { byId, element } from "./dom.js";
import { choicesFor, firstChoice, isOwn } from "./policies.js";

// Fields of the API that people fill in, each with its control.
const CONTROLS = {
  model: "model",
  prompt: "prompt",
  class_label: "class-label",
  policy: "policy",
  num_inference_steps: "steps",
  n: "count",
  seed: "seed",
  guidance_scale: "guidance",
};
const NUMBERS = ["class_label", "num_inference_steps", "n", "seed", "guidance_scale"];
const NUMBER = /^(-?)0*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)$/;
const SEEDS = 1000000; // random seeds are below this, so that they are short
const SMALL = 64 * 64; // pixels; smaller pictures are cheap enough to preview at every step
const FEW = 10; // previews of larger pictures
const MANY = 2048; // most previews of a request

export class Form {
  // entries: of /v1/models, at least one.
  constructor(entries) {
    this.entries = new Map(entries.map(({ id, adadiff }) => [id, adadiff]));
    byId("model").replaceChildren(...entries.map(({ id }) => element("option", { value: id, textContent: id })));
    this.adapt();
    byId("count").value = "1";
    this.newSeed();
  }

  get entry() {
    return this.entries.get(byId("model").value);
  }

  get choice() {
    return this.choices[byId("policy").selectedIndex];
  }

  get policy() {
    if (isOwn(this.choice)) return byId("policy-text").value.trim();
    return this.choice.spelled(byId("policy-value").value.trim());
  }

  get count() {
    return Number(byId("count").value.trim() || 1);
  }

  get seed() {
    return byId("seed").value.trim();
  }

  newSeed() {
    byId("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS);
  }

  // Adapts fields and their initial values to the chosen model.
  adapt() {
    const { entry } = this;
    const [width, height] = entry.size.split("x");
    const classes = entry.classes ? `, ${entry.classes} classes` : "";
    byId("model-hint").textContent = `${width} × ${height} pixels${classes}, ${entry.num_layers} blocks`;
    show("prompt", entry.takes === "text");
    show("class_label", entry.takes === "class_label");
    show("guidance_scale", entry.guidance);
    const names = entry.class_names.length ? entry.class_names : Array.from({ length: entry.classes ?? 0 }, (_, i) => i);
    const options = names.map((name, i) => element("option", { value: String(i), textContent: String(name) }));
    if (entry.guidance) options.push(element("option", { value: "", textContent: "no class" }));
    byId("class-label").replaceChildren(...options);
    byId("steps").value = String(entry.calibrated_for?.steps ?? entry.num_inference_steps);
    byId("guidance").value = String(entry.calibrated_for?.guidance_scale ?? 1);
    this.#listPolicies();
    this.explain();
  }

  #listPolicies() {
    this.choices = choicesFor(this.entry);
    const groups = new Map();
    for (const { group, words } of this.choices) {
      if (!groups.has(group)) groups.set(group, element("optgroup", { label: group }));
      groups.get(group).append(element("option", { textContent: words }));
    }
    // in the order of the groups, so that an option's index is its choice's
    this.choices = [...groups.keys()].flatMap((group) => this.choices.filter((choice) => choice.group === group));
    byId("policy").replaceChildren(...groups.values());
    this.#choose(firstChoice(this.choices));
  }

  #choose(choice, value = choice.start ?? "") {
    byId("policy").selectedIndex = this.choices.indexOf(choice);
    byId("policy-value").value = value;
  }

  // Sets the initial value of a newly chosen policy.
  begin() {
    this.#choose(this.choice);
    this.explain();
  }

  explain() {
    const { choice, entry } = this;
    byId("policy-value-line").hidden = choice.value === null;
    byId("policy-value-label").textContent = choice.value ?? "";
    byId("policy-text").hidden = !isOwn(choice);
    const { steps, solver, guidance_scale: scale } = entry.calibrated_for ?? {};
    const calibrated = choice.group.endsWith("calibrated");
    const off = steps !== Number(byId("steps").value) || scale !== Number(byId("guidance").value);
    const note = calibrated && off ? `, calibrated for ${steps} steps of ${solver} and guidance ${scale}` : "";
    const examples = "parts joined by +, as in cache:threshold=0.1+exit:depth=6";
    byId("policy-hint").textContent = isOwn(choice) ? examples : this.policy + note;
  }

  // The filled-in values, as text, by field of the API.
  get filled() {
    const found = {};
    for (const [param, id] of Object.entries(CONTROLS)) {
      const value = param === "policy" ? this.policy : byId(id).value.trim();
      if (!field(param).hidden && value !== "") found[param] = value;
    }
    return found;
  }

  // JSON of a request. Numbers are sent as typed, since JavaScript would round large seeds. Throws {param, message}.
  body(policy) {
    const parts = Object.entries({ ...this.filled, policy }).map(([param, value]) => {
      const raw = NUMBERS.includes(param) ? number(param, value) : JSON.stringify(value);
      return `${JSON.stringify(param)}:${raw}`;
    });
    return `{${parts.join(",")},"stream":true,"partial_images":${this.#previews()}}`;
  }

  // Number of previews: one for each step, or FEW for large pictures, within the service's limits.
  #previews() {
    const { size, max_partial_images: most } = this.entry;
    const [width, height] = size.split("x").map(Number);
    const steps = Number(byId("steps").value) || this.entry.num_inference_steps;
    const wanted = width * height > SMALL ? FEW : Math.floor(steps) - 1;
    return Math.max(0, Math.min(wanted, most, Math.floor(MANY / this.count))) || 0;
  }

  get fragment() {
    const none = this.entry.takes === "class_label" ? { class_label: "" } : {}; // if no class is chosen
    return String(new URLSearchParams({ ...none, ...this.filled }));
  }

  // Fills in the settings of a link. Returns a message about those that do not fit.
  read(fragment) {
    const given = new URLSearchParams(fragment);
    const missed = [];
    if (given.has("model")) {
      if (this.entries.has(given.get("model"))) byId("model").value = given.get("model");
      else missed.push(`there is no model “${given.get("model")}” here`);
    }
    this.adapt();
    for (const [param, value] of given) {
      if (param === "policy") this.#readPolicy(value);
      else if (param !== "model" && Object.hasOwn(CONTROLS, param)) {
        byId(CONTROLS[param]).value = value;
        if (param === "class_label" && byId(CONTROLS[param]).selectedIndex < 0) {
          byId(CONTROLS[param]).selectedIndex = 0;
          missed.push(`there is no class ${value} here`);
        }
      }
    }
    this.explain();
    return missed.length ? `Some settings of this link do not fit: ${missed.join("; ")}.` : "";
  }

  #readPolicy(text) {
    const plain = this.choices.find((choice) => !isOwn(choice) && choice.valueIn(text) === "");
    const filled = plain ?? this.choices.find((choice) => !isOwn(choice) && choice.valueIn(text) !== null);
    this.#choose(filled ?? this.choices.find(isOwn), filled?.valueIn(text) ?? "");
    byId("policy-text").value = filled ? "" : text;
  }

  // Shows an error beside the field it names, and focuses it. False if that field is not on the page.
  blame({ param, message }) {
    if (!Object.hasOwn(CONTROLS, param ?? "") || field(param).hidden) return false;
    // the API's message without the name of the field, which is shown beside it
    const words = message.replace(new RegExp(`^${param}(: | (?=must ))`), "");
    byId(`${CONTROLS[param]}-error`).textContent = words.charAt(0).toUpperCase() + words.slice(1);
    const inputs = [...field(param).querySelectorAll("input, select, textarea")].filter((input) => input.offsetParent);
    for (const input of inputs) input.setAttribute("aria-invalid", "true");
    inputs.at(-1)?.focus();
    return true;
  }

  forgive(scope = byId("settings")) {
    for (const error of scope.querySelectorAll(".error")) error.textContent = "";
    for (const input of scope.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  }
}

function field(param) {
  return byId("settings").querySelector(`[data-param="${param}"]`);
}

function show(param, visible) {
  field(param).hidden = !visible;
}

function number(param, text) {
  const found = NUMBER.exec(text.startsWith(".") ? `0${text}` : text);
  if (!found) throw { param, message: `This takes a number, not “${text.slice(0, 40)}”.` };
  return found[1] + found[2];
}
