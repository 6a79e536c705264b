// Parser of server-sent events in the body of a reply. (EventSource cannot send a body or a key.)

export class Silence extends Error {}

// Yields the data of each event, parsed. Throws Silence if nothing arrives for `patience` milliseconds.
export async function* eventsOf(body, patience) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await within(reader.read(), patience);
      if (done) return;
      text += value;
      for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
        const data = dataOf(text.slice(0, end));
        text = text.slice(end + 2);
        if (data !== null) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // closes the connection, so that the service stops drawing
  }
}

// null for a comment, which only keeps the connection open.
function dataOf(block) {
  const lines = block.split("\n").filter((line) => line.startsWith("data: "));
  return lines.length ? lines.map((line) => line.slice(6)).join("\n") : null;
}

async function within(promise, patience) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Silence()), patience);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}
