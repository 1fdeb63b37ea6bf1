// Requests to the server that the page comes from: its models, answers as they are written, and what can go wrong.

import { session } from "./conversations.js";

const KEY = "elm-mlx/key";
const LONGEST_WAIT = 10; // seconds between attempts to reach a server that is gone

/**
 * What went wrong, by `kind`: "gone" (no server), "lost" (the connection, amid an answer), "busy", "key" (another is
 * needed), "context" (the text is too long), "refused" (the request), "failed" (the server).
 */
export class Trouble extends Error {
  constructor(kind, message, { param = null, wait = 0 } = {}) {
    super(message);
    Object.assign(this, { kind, param, wait });
  }
}

export class Server {
  /** The API key, kept until the tab is closed. */
  get key() {
    return session.getItem(KEY) ?? "";
  }

  set key(key) {
    session.setItem(KEY, key);
  }

  async models() {
    const { data } = await (await this.#fetch("v1/models")).json();
    return data;
  }

  /** Yields the chunks of a streamed answer. Throws Trouble. */
  async *stream(path, body, signal) {
    const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
    const headers = { "Content-Type": "application/json" };
    const response = await this.#fetch(path, { method: "POST", headers, body: JSON.stringify(streamed), signal });
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Trouble("failed", chunk.error.message);
      yield chunk;
    }
    throw new Trouble("gone", "The connection to the server was lost.");
  }

  async #fetch(path, options = {}) {
    const headers = { ...options.headers, ...(this.key && { Authorization: `Bearer ${this.key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
    } catch (error) {
      throw options.signal?.aborted ? error : new Trouble("gone", "The server does not answer.");
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function refusal(response) {
  const { message, code, param } = (await response.json().catch(() => ({}))).error ?? {};
  const text = message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  const wait = Number(response.headers.get("Retry-After")) || 0;
  if (response.status === 401) return new Trouble("key", text);
  if (code === "context_length_exceeded") return new Trouble("context", text);
  const passes = [429, 503].includes(response.status) && code !== "out_of_memory"; // what is too large stays so
  if (passes) return new Trouble("busy", "The server is busy.", { wait });
  return new Trouble(response.status < 500 ? "refused" : "failed", text, { param });
}

/** The data of server-sent events. */
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

/** A task that is tried again while its trouble is one that passes: a server gone or busy, a key that is missing. */
export class Attempts {
  waiting = null; // while it waits: {message, until}, until in milliseconds of Date.now()
  #stopper = new AbortController();
  #goOn = () => {};

  /** `askKey(message)` returns true once there is another key, `changed()` hears of each change of `waiting`. */
  constructor(askKey, changed) {
    Object.assign(this, { askKey, changed });
  }

  get stopped() {
    return this.#stopper.signal.aborted;
  }

  /** Returns what `task(signal)` does, undefined if stopped. Throws Trouble that does not pass by waiting. */
  async run(task) {
    for (let tried = 0; !this.stopped; tried++) {
      try {
        return await task(this.#stopper.signal);
      } catch (trouble) {
        if (this.stopped) break;
        if (!(await this.#passes(trouble, tried))) throw trouble;
      }
    }
    return undefined;
  }

  stop() {
    this.#stopper.abort();
    this.#goOn();
  }

  tryNow() {
    this.#goOn();
  }

  async #passes(trouble, tried) {
    if (trouble.kind === "key") return this.askKey(trouble.message);
    if (trouble.kind !== "gone" && trouble.kind !== "busy") return false;
    await this.#wait(trouble.message, trouble.wait || Math.min(2 ** tried, LONGEST_WAIT));
    return true;
  }

  async #wait(message, seconds) {
    this.waiting = { message, until: Date.now() + 1000 * seconds };
    this.changed();
    await new Promise((resolve) => {
      this.#goOn = resolve;
      setTimeout(resolve, 1000 * seconds);
    });
    this.waiting = null;
    this.changed();
  }
}

/** An answer that is being written. `changed()` hears of its text, its waits and its end. */
export class Answer {
  done = false;
  text = "";
  finish = null; // "stop", "length", "stopped", or null where trouble ended it
  trouble = null;
  sources = null; // passages of documents that it was given, where the server has some
  figures = {}; // {prompt, tokens, first, rate}: tokens of both, seconds to the first, tokens a second
  #started = 0;
  #times = []; // of the first and the last piece
  #pieces = 0;

  constructor(server, path, body, { askKey, changed }) {
    this.attempts = new Attempts(askKey, changed);
    Object.assign(this, { server, path, body, changed });
  }

  get waiting() {
    return this.attempts.waiting;
  }

  stop() {
    this.attempts.stop();
  }

  async run() {
    try {
      await this.attempts.run((signal) => this.#write(signal));
      if (this.attempts.stopped) this.finish = "stopped";
    } catch (error) {
      const known = error instanceof Trouble;
      this.trouble = known ? error : new Trouble("failed", `The answer cannot be read: ${error.message}`);
    }
    this.done = true;
    this.changed();
  }

  async #write(signal) {
    this.#started = performance.now();
    try {
      for await (const chunk of this.server.stream(this.path, this.body, signal)) this.#take(chunk);
    } catch (error) {
      if (this.text && error.kind === "gone") error.kind = "lost"; // it is not begun again
      throw error;
    }
  }

  #take({ choices, usage, sources }) {
    this.sources = sources ?? this.sources;
    const choice = choices?.[0];
    this.#add(choice?.delta?.content ?? choice?.text ?? "");
    this.finish = choice?.finish_reason ?? this.finish;
    if (usage) this.#count(usage.completion_tokens, usage.prompt_tokens);
  }

  #add(piece) {
    if (!piece) return;
    this.text += piece;
    this.#times[this.#times.length && 1] = performance.now();
    this.#count(++this.#pieces);
    this.changed();
  }

  /** Until the server says how many tokens there are, pieces are counted. */
  #count(tokens, prompt) {
    const [first, last = first] = this.#times;
    const rate = last > first ? (1000 * (tokens - 1)) / (last - first) : 0;
    this.figures = { prompt, tokens, first: (first - this.#started) / 1000, rate };
  }
}
