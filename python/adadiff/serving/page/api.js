// Requests to the service: the API key, error messages, and the stream of a request.

import { eventsOf, Silence } from "./events.js";

const KEY = "adadiff.key"; // in sessionStorage, nowhere else
const PATIENCE = 45000; // milliseconds; while drawing, the service sends something at least every 15 seconds

// param: the invalid field. code: as in the API, or "unreachable" and "cut_off".
export class Refusal extends Error {
  constructor(message, { param = null, code = null, status = 0 } = {}) {
    super(message);
    Object.assign(this, { param, code, status });
  }
}

export function storedKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null; // the browser forbids storage
  }
}

// "" forgets it.
export function storeKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export async function listModels() {
  return (await (await ask("v1/models")).json()).data;
}

// body: JSON text of a request with stream: true. onOpen: called when it is accepted. onEvent: called with each event.
// Returns when `count` images are finished. Throws Refusal, and AbortError once `signal` is aborted.
export async function draw(body, count, signal, { onOpen, onEvent }) {
  const headers = { "Content-Type": "application/json" };
  const reply = await ask("v1/images/generations", { method: "POST", headers, body, signal });
  onOpen();
  let finished = 0;
  try {
    for await (const event of eventsOf(reply.body, PATIENCE)) {
      if (event.type === "error") throw refusal(event.error, 0);
      if (event.type === "image_generation.completed") finished += 1;
      onEvent(event);
    }
  } catch (error) {
    if (error instanceof Silence) throw new Refusal("The service has stopped sending.", { code: "cut_off" });
    if (error instanceof Refusal || error.name === "AbortError") throw error;
    if (error instanceof TypeError || error instanceof SyntaxError) throw cutOff();
    throw error;
  }
  if (finished < count) throw cutOff();
}

function cutOff() {
  return new Refusal("The connection broke off before the pictures were finished.", { code: "cut_off" });
}

async function ask(address, options = {}) {
  const headers = { ...options.headers };
  const key = storedKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(address, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service does not answer. It may have been stopped.", { code: "unreachable" });
  }
  if (reply.ok) return reply;
  let error = {};
  try {
    error = (await reply.json()).error ?? {};
  } catch {
    // not the API's JSON, such as a proxy's page: only the status is known
  }
  const wait = reply.headers.get("Retry-After");
  if (wait && error.message) error.message += ` Try again in ${wait} s.`;
  throw refusal(error, reply.status);
}

function refusal(error, status) {
  const { message = `The service answers with status ${status}.`, param, code } = error;
  return new Refusal(message, { param, code, status });
}
