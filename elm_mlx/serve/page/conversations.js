// Conversations, kept in the browser: one entry of localStorage each, so that no tab writes over another's.
//
// A conversation of kind "chat" has `messages`, each `{role, content}`, an answer with its `figures` and `finish` too;
// one of kind "text" has the `text` that a base model continues, and the figures of the last continuation. Of messages
// or characters the model is no longer sent the first `skip`. `revision` changes each time that it is saved.

const PREFIX = "elm-mlx/conversation/";
const TITLE = 60; // characters

/** 64 random bits in hex; crypto.randomUUID is there for https and this machine alone. */
function randomName() {
  return [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(kind, model) {
  const begun = { system: "", messages: [], text: "", figures: null, skip: 0 };
  return { id: randomName(), kind, model, ...begun, updated: Date.now(), revision: "" };
}

export const isEmpty = (conversation) => !conversation.messages.length && !conversation.text && !conversation.system;

export function title({ kind, messages, text }) {
  const said = kind === "text" ? text : (messages.find(({ role }) => role === "user")?.content ?? "");
  const line = said.trim().split("\n", 1)[0];
  if (!line) return kind === "text" ? "New text" : "New conversation";
  return line.length > TITLE ? `${line.slice(0, TITLE).trimEnd()}…` : line;
}

/** What goes to the model, or into a file: the system prompt, then messages by turns. */
export function toMessages({ system, messages, skip }) {
  const turns = [];
  for (const { role, content } of messages.slice(skip)) {
    if (turns.at(-1)?.role === role) turns.at(-1).content += `\n\n${content}`; // a question that went unanswered
    else turns.push({ role, content });
  }
  return system.trim() ? [{ role: "system", content: system }, ...turns] : turns;
}

/** A conversation as a file: JSON as `elm-mlx chat` saves and loads it, a text as it is. */
export function toFile(conversation) {
  const words = title(conversation).match(/[\p{L}\p{N}]+/gu) ?? ["conversation"];
  const name = words.join("-").slice(0, 40);
  if (conversation.kind === "text") return new File([conversation.text], `${name}.txt`, { type: "text/plain" });
  const messages = toMessages({ ...conversation, skip: 0 });
  if (messages.at(-1)?.role === "user") messages.pop(); // it has no answer yet
  return new File([`${JSON.stringify({ messages }, null, 2)}\n`], `${name}.json`, { type: "application/json" });
}

/** The conversation in a file that `toFile` or `elm-mlx chat` has written. Throws an Error that says what is wrong. */
export function fromFile(name, text, model) {
  const said = parsed(text)?.messages;
  if (!Array.isArray(said)) throw new Error(`${name} holds no conversation: it needs a list “messages”.`);
  const first = said[0]?.role === "system" ? 1 : 0;
  said.forEach((message, index) => {
    const expected = index < first ? "system" : (index - first) % 2 ? "assistant" : "user";
    if (message?.role === expected && typeof message.content === "string") return;
    throw new Error(`${name}: message ${index + 1} must be a text of “${expected}”.`);
  });
  const messages = said.slice(first).map(({ role, content }) => ({ role, content }));
  return { ...newConversation("chat", model), system: first ? said[0].content : "", messages };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** A stored conversation, checked; null where the entry is damaged. */
function restored(id, text) {
  const found = parsed(text);
  if (!["chat", "text"].includes(found?.kind) || !Array.isArray(found.messages)) return null;
  const whole = (message) => ["user", "assistant"].includes(message?.role) && typeof message.content === "string";
  if (!found.messages.every(whole)) return null;
  const { kind, messages, figures = null } = found;
  const [model, system, body, revision] = ["model", "system", "text", "revision"].map((name) => `${found[name] ?? ""}`);
  const [skip, updated] = [found.skip, found.updated].map((number) => Number(number) || 0);
  return { id, kind, model, system, messages, text: body, figures, skip, updated, revision };
}

/** The browser's localStorage or sessionStorage; where it refuses that, what lasts as long as the page. */
function storageOr(name) {
  try {
    window[name].getItem("");
    return window[name];
  } catch {
    const entries = new Map();
    return {
      getItem: (key) => entries.get(key) ?? null,
      setItem: (key, value) => entries.set(key, value),
      removeItem: (key) => entries.delete(key),
      key: (index) => [...entries.keys()][index] ?? null,
      get length() { return entries.size; },
    };
  }
}

const storage = storageOr("localStorage");
export const session = storageOr("sessionStorage");

/** The value that is kept under a name, null where there is none. */
export const kept = (name) => parsed(storage.getItem(name));

/** Keeps a value under a name. Returns false where there is no room for it. */
export function keep(name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export class Conversations {
  #listed = new Map(); // by id: {id, title, updated}
  #unsaved = new Map(); // by id: those for which there was no room

  /** `onChange(id)` is called when another tab has changed a conversation, with null when it has changed many. */
  constructor(onChange) {
    this.#readAll();
    addEventListener("storage", ({ key, storageArea }) => {
      if (storageArea !== storage || (key !== null && !key.startsWith(PREFIX))) return;
      const id = key?.slice(PREFIX.length) ?? null;
      if (id === null) this.#readAll();
      else this.#list(id);
      onChange(id);
    });
  }

  /** All, the latest first. */
  list() {
    return [...this.#listed.values()].sort((one, other) => other.updated - one.updated);
  }

  /** The conversation of that id; null where there is none, or a damaged one. */
  read(id) {
    return this.#unsaved.get(id) ?? restored(id, storage.getItem(PREFIX + id));
  }

  /** The entry as it is stored, of a damaged one too. */
  raw(id) {
    return storage.getItem(PREFIX + id);
  }

  /**
   * Saves a conversation, or keeps it for this page where there is no room: then returns false.
   * One that another tab has changed since it was read gets an id of its own, so that both are kept.
   */
  save(conversation) {
    const there = restored(conversation.id, this.raw(conversation.id));
    if (there && there.revision !== conversation.revision) conversation.id = randomName();
    const { id, ...rest } = conversation;
    const revision = randomName();
    const saved = keep(PREFIX + id, { ...rest, revision });
    if (saved) {
      conversation.revision = revision;
      this.#unsaved.delete(id);
    } else {
      this.#unsaved.set(id, conversation);
    }
    this.#list(id);
    return saved;
  }

  remove(id) {
    this.#unsaved.delete(id);
    this.#listed.delete(id);
    storage.removeItem(PREFIX + id);
  }

  #readAll() {
    this.#listed.clear();
    const keys = Array.from({ length: storage.length }, (_, index) => storage.key(index));
    for (const key of keys) if (key?.startsWith(PREFIX)) this.#list(key.slice(PREFIX.length));
    for (const id of this.#unsaved.keys()) this.#list(id);
  }

  #list(id) {
    const conversation = this.read(id);
    if (conversation) this.#listed.set(id, { id, title: title(conversation), updated: conversation.updated });
    else if (this.raw(id) !== null) this.#listed.set(id, { id, title: "Damaged conversation", updated: 0 });
    else this.#listed.delete(id);
  }
}
