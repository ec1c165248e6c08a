// Calls to the server that this page comes from.

export const server = { model: "", key: "" }; // its model's name, once it is known, and the key that it may ask for

/** Its message is for the reader; `status` is the server's, if it has answered. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(server.key && { Authorization: `Bearer ${server.key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Failure(sentence(told?.error?.message ?? `The server answered with status ${response.status}.`), response.status);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** The JSON of each server-sent event. Throws a `Failure` for an error inside the stream, and for one that breaks off. */
export async function* events(path, body, signal) {
  const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Failure("The connection broke off.");
    });
    if (done) throw new Failure("The stream ended before the answer did.");
    const blocks = (unread + value).split("\n\n");
    unread = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (!data.length) continue; // a comment, which keeps the connection open
      if (data[0] === "[DONE]") return;
      const event = JSON.parse(data.join("\n"));
      if (event.error) throw new Failure(sentence(event.error.message));
      yield event;
    }
  }
}
