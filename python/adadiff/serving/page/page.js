// The page of `adadiff serve`: a form with settings, and pictures as they are drawn.

import { draw, listModels, Refusal, storeKey, storedKey } from "./api.js";
import { byId, images, percent, seconds } from "./dom.js";
import { Form } from "./form.js";
import { differenceOf, differencePicture } from "./pictures.js";
import { PictureSet } from "./sets.js";

let form = null; // once the models are known
let running = null; // AbortController of the request in progress
let sets = [];
let keeping = 0; // timer

async function open() {
  say("Asking which models there are …");
  complain("");
  byId("again-line").hidden = true;
  let entries;
  try {
    entries = await listModels();
  } catch (error) {
    say("");
    if (error.status === 401) return askForKey(storedKey() ? "The service does not know this key." : "");
    byId("again-line").hidden = false;
    return complain(wordsOf(error));
  }
  byId("key-form").hidden = true;
  byId("settings").hidden = false;
  byId("key-line").hidden = !storedKey();
  form = new Form(entries);
  say(form.read(location.hash.slice(1)));
  keepInAddress();
  byId("welcome").hidden = sets.length > 0;
}

function askForKey(message) {
  storeKey("");
  byId("settings").hidden = true;
  byId("welcome").hidden = true;
  byId("key-form").hidden = false;
  byId("key").value = "";
  byId("key-error").textContent = message;
  byId("key").toggleAttribute("aria-invalid", Boolean(message));
  byId("key").focus();
}

function useKey(event) {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!/^[!-~]+$/.test(key)) {
    byId("key-error").textContent = "A key has letters, digits and signs of ASCII, and no space.";
    return;
  }
  storeKey(key);
  byId("key-error").textContent = "";
  open();
}

// policies: one, or two to compare.
async function start(policies) {
  if (running || !form) return;
  form.forgive();
  complain("");
  if (!form.seed) form.newSeed();
  let bodies;
  try {
    bodies = policies.map((policy) => form.body(policy));
  } catch (error) {
    form.blame(error);
    return;
  }
  keepInAddress();
  const controller = (running = new AbortController());
  drawing(true);
  const began = performance.now();
  try {
    const { shape, seed, count } = order();
    for (const [turn, policy] of policies.entries()) {
      const set = new PictureSet(policy, shape, seed, count);
      const onOpen = () => {
        if (turn === 0) clear(); // not before: a refused request keeps the old pictures
        sets.push(set);
        byId("sets").append(set.root);
        if (turn === 0) reveal();
      };
      const onEvent = (event) => {
        set.take(event);
        byId("progress").value = (turn + set.progress) / policies.length;
      };
      say(`Drawing ${images(count)} with ${policy} …`);
      await draw(bodies[turn], count, controller.signal, { onOpen, onEvent });
      await set.finish();
    }
    conclude();
  } catch (error) {
    const after = seconds((performance.now() - began) / 1000);
    fail(error, controller.signal.aborted ? `Stopped after ${after}.` : "");
  } finally {
    for (const set of sets) set.end();
    running = null;
    drawing(false);
  }
}

// Shape, seed and count for a set of pictures. Invalid numbers, which the service will refuse, are replaced.
function order() {
  const [width, height] = form.entry.size.split("x").map(Number);
  const within = (value, most) => (Number.isInteger(value) && value > 0 ? Math.min(value, most) : 1);
  const { max_n: most, max_num_inference_steps: mostSteps, num_inference_steps: usual } = form.entry;
  const steps = within(Number(byId("steps").value || usual), mostSteps);
  const seed = /^\d+$/.test(form.seed) ? form.seed : "0";
  const shape = { width, height, steps, layers: form.entry.num_layers };
  return { shape, seed, count: within(form.count, most) };
}

function conclude() {
  const [first, second] = sets.map((set) => set.result);
  if (!second) {
    return say(`Done in ${seconds(first.running)}; ${percent(first.leftOut)} of the blocks were left out.`);
  }
  const pairs = sets[0].cards.map((card, i) => [card.picture.data, sets[1].cards[i].picture.data]);
  const each = pairs.map(([a, b]) => differenceOf(a, b));
  const mean = each.reduce((sum, one) => sum + one.mean, 0) / each.length;
  const most = Math.max(...each.map((one) => one.most));
  const { width, height } = sets[0].shape;
  const pictures = pairs.map(([a, b], i) =>
    differencePicture(a, b, width, height, most, `Difference, seed ${sets[0].cards[i].seed}`),
  );
  const text = most
    ? `${mean.toFixed(2)} of 255 grey levels on average; the largest is ${most}.`
    : "None: the pictures are the same in every pixel.";
  byId("difference-text").textContent = text;
  byId("difference-hint").textContent = most ? `White is the largest difference, ${most}.` : "";
  byId("difference-pictures").replaceChildren(...(most ? pictures : []));
  byId("difference").hidden = false;
  say(
    `Full: ${seconds(first.running)}. ${sets[1].title}: ${seconds(second.running)}, ` +
      `${percent(second.leftOut)} of the blocks left out. Difference: ${mean.toFixed(2)} of 255 grey levels.`,
  );
}

function fail(error, stopped) {
  say(stopped);
  if (stopped) return;
  if (error instanceof Refusal && error.status === 401) {
    askForKey("The service does not know this key any more.");
    return;
  }
  if (!(error instanceof Refusal && form.blame(error))) complain(wordsOf(error));
}

function wordsOf(error) {
  if (!(error instanceof Refusal)) console.error(error); // a defect of this page
  return error instanceof Refusal ? error.message : `Something is wrong with this page: ${error.message ?? error}`;
}

function compare() {
  if (!form || running) return;
  if (form.policy === "full") {
    form.forgive();
    form.blame({ param: "policy", message: "Choose a policy that leaves something out, to compare it with full." });
  } else start(["full", form.policy]);
}

function clear() {
  for (const set of sets) set.release();
  sets = [];
  byId("sets").replaceChildren();
  byId("difference").hidden = true;
  byId("welcome").hidden = true;
}

function drawing(now) {
  // not `disabled`, which would move the focus away from a pressed button
  for (const id of ["draw", "compare"]) byId(id).setAttribute("aria-disabled", String(now));
  const focused = document.activeElement === byId("stop");
  byId("stop").hidden = !now;
  if (!now && focused) byId("draw").focus();
  byId("progress").hidden = !now;
  byId("progress").value = 0;
}

function reveal() {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const { top } = byId("result").getBoundingClientRect();
  if (top > innerHeight / 2) byId("result").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
}

function stop() {
  running?.abort();
}

function say(text) {
  byId("status").textContent = text;
}

function complain(text) {
  byId("problem").textContent = text;
}

// Delayed, because browsers limit how often the address may change.
function keepInAddress() {
  clearTimeout(keeping);
  keeping = setTimeout(() => history.replaceState(null, "", `#${form.fragment}`), 150);
}

function changed(event) {
  const scope = event.target.closest(".field");
  if (scope) form.forgive(scope);
  if (event.target.id === "model") form.adapt();
  if (event.target.id === "policy") form.begin();
  form.explain();
  keepInAddress();
}

byId("key-form").addEventListener("submit", useKey);
byId("forget-key").addEventListener("click", () => {
  stop();
  askForKey("");
});
byId("again").addEventListener("click", open);
byId("settings").addEventListener("input", changed);
byId("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  start([form.policy]);
});
byId("compare").addEventListener("click", compare);
byId("stop").addEventListener("click", stop);
byId("new-seed").addEventListener("click", () => {
  form.newSeed();
  form.forgive(byId("new-seed").closest(".field"));
  keepInAddress();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
addEventListener("hashchange", () => {
  if (form) say(form.read(location.hash.slice(1)));
});
open();
