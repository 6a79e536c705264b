// Readable choices for the policies that /v1/models lists, some with a value to fill in.

const PLACE = /[A-Z]{3,}/; // as THRESHOLD in exit:THRESHOLD
const NUMBER = /^\d*\.?\d+$/;
const OWN = "";

// By form: group, text, name of the value, initial value (for a network with L blocks).
const KNOWN = {
  "full": ["Everything", "Full: every block at every step"],
  "exit:THRESHOLD": ["Exit early", "Exit when certain enough", "Uncertainty", () => "0.1"],
  "exit:patience=THRESHOLD": ["Exit early", "Exit when certain twice", "Uncertainty", () => "0.1"],
  "exit:depth=BLOCKS": ["Exit early", "Exit after a fixed block", "Block", (L) => String(Math.ceil(L / 2))],
  "cache:threshold=CHANGE": ["Reuse earlier steps", "Reuse where little changed", "Change", () => "0.1"],
  "reuse:every=STEPS": ["Reuse earlier steps", "Reuse between full steps", "Every … steps", () => "2"],
};
const CALIBRATED = [
  [/^exit:budget=(.+)$/, "Exit early, calibrated", (share) => `Exit, about ${round(share)} % of the work`],
  [/^exit:table=(.+)$/, "Exit by table, calibrated", (share) => `A block for each step, ${round(share)} % of the work`],
];

function round(share) {
  return Math.round(100 * Number(share));
}

export class Choice {
  constructor(form, group, words, value = null, start = null) {
    Object.assign(this, { form, group, words, value, start });
  }

  spelled(value) {
    return this.value === null ? this.form : this.form.replace(PLACE, () => value);
  }

  // The value with which this choice gives the policy `text`; null if no value does.
  valueIn(text) {
    if (this.value === null) return this.form === text ? "" : null;
    const [before, after] = this.form.split(PLACE);
    if (!text.startsWith(before) || !text.endsWith(after)) return null;
    const value = text.slice(before.length, text.length - after.length);
    return NUMBER.test(value) ? value : null;
  }
}

// entry: of /v1/models. The last choice is free text.
export function choicesFor(entry) {
  const made = entry.policies.map((form) => {
    if (Object.hasOwn(KNOWN, form)) {
      const [group, words, value, start] = KNOWN[form];
      return new Choice(form, group, words, value, start?.(entry.num_layers));
    }
    for (const [pattern, group, words] of CALIBRATED) {
      const found = form.match(pattern);
      if (found) return new Choice(form, group, words(found[1]));
    }
    if (PLACE.test(form) && form.includes(":")) return new Choice(form, "Others", form, "Value", "");
    return new Choice(form, "Of this service", form);
  });
  return [...made, new Choice(OWN, "Others", "Text of your own")];
}

// The initial choice: the operator's "default", else the calibrated budget nearest to 0.55, else an exit or a cache.
export function firstChoice(choices) {
  const half = (choice) => Math.abs(Number(choice.form.split("=")[1]) - 0.55);
  const budgets = choices.filter((choice) => choice.form.startsWith("exit:budget=")).sort((a, b) => half(a) - half(b));
  const named = (form) => choices.find((choice) => choice.form === form);
  return named("default") ?? budgets[0] ?? named("exit:THRESHOLD") ?? named("cache:threshold=CHANGE") ?? choices[0];
}

export function isOwn(choice) {
  return choice.form === OWN;
}
