// The page: which conversation is open, the answers that are being written, the models. `chat.js` shows a conversation,
// `text.js` a text to continue, `sidebar.js` what else there is.

import { ChatView } from "./chat.js";
import { Conversations, isEmpty, newConversation, title } from "./conversations.js";
import { $, card, download, element, hideToast, isComposing, Painter, toast, waitingCard } from "./parts.js";
import { listenToPreferences, samplingFor, showDefaults } from "./preferences.js";
import { Answer, Attempts, Server } from "./requests.js";
import { Sidebar } from "./sidebar.js";
import { TextView } from "./text.js";

const SAVE_EVERY = 2000; // milliseconds, while an answer is written

class Page {
  models = [];
  answers = new Map(); // by conversation: its latest Answer, until the next step
  open = null; // the conversation that is shown
  store = new Conversations((id) => this.#changedElsewhere(id));
  #server = new Server();
  #saved = new WeakMap(); // by conversation: when, in milliseconds
  #askingKey = null;
  #systemBefore = ""; // the system prompt, when the settings were opened
  #painter = new Painter(() => this.view.update());

  constructor() {
    this.views = { chat: new ChatView(this), text: new TextView(this) };
    this.sidebar = new Sidebar(this);
  }

  get view() {
    return this.views[this.open.kind];
  }

  /** The answer that is being written here, if one is. */
  get running() {
    const answer = this.answers.get(this.open);
    return answer && !answer.done ? answer : null;
  }

  /** The model that answers here: the conversation's where it is served, otherwise the first of its kind, if any. */
  get model() {
    const isText = this.open.kind === "text";
    const fitting = this.models.filter(({ kind }) => (kind === "base") === isText);
    if (isText) fitting.push(...this.models); // any model continues a text
    return fitting.find(({ id }) => id === this.open.model) ?? fitting[0];
  }

  async start() {
    this.#listen();
    this.route();
    await this.loadModels();
  }

  /** Shows the conversation that the address names, or a new one. */
  route() {
    const id = location.hash.slice(1);
    const found = this.#find(id);
    if (found) this.show(found);
    else if (id && this.store.raw(id) !== null) this.#showDamaged(id);
    else this.begin();
  }

  /** The conversation of an id; the very one that an answer is written into. */
  #find(id) {
    return [...this.answers.keys()].find((conversation) => conversation.id === id) ?? this.store.read(id);
  }

  /** Begins a conversation of the kind that the chosen model is for. It is saved with what is first said in it. */
  begin(model = $("model").value) {
    const chosen = this.models.find(({ id }) => id === model) ?? this.models[0];
    if (location.hash) history.pushState(null, "", location.pathname);
    this.show(newConversation(chosen?.kind === "base" ? "text" : "chat", chosen?.id ?? ""));
    this.view.focus();
  }

  show(conversation) {
    const another = conversation.id !== this.open?.id;
    this.open = conversation;
    document.body.dataset.kind = conversation.kind;
    $("system").value = conversation.system;
    this.view.show(conversation, another);
    this.#showModel();
    this.sidebar.update();
    if (!another) return;
    this.sidebar.toggle(false);
    hideToast();
  }

  /** Gets an answer. `take(answer)` puts its text into the conversation, each time that there is more. */
  async answer(conversation, path, body, take) {
    const changed = () => {
      if (this.answers.get(conversation) !== answer) return; // it was taken back
      take(answer);
      const waited = Date.now() - (this.#saved.get(conversation) ?? 0);
      if (answer.text && waited > SAVE_EVERY) this.#save(conversation);
      if (conversation === this.open) this.#painter.request();
    };
    const askKey = (message) => this.#askKey(message);
    const { model } = this; // of a conversation that is open, as all that are asked are
    const request = { model: model.id, ...body, ...samplingFor(model) };
    const answer = new Answer(this.#server, path, request, { askKey, changed });
    this.answers.set(conversation, answer);
    conversation.updated = Date.now();
    $("status").textContent = "Writing";
    const ended = answer.run();
    this.view.update();
    this.sidebar.update();
    await ended;
    this.#finished(conversation, answer);
    return answer;
  }

  #finished(conversation, answer) {
    if (this.answers.get(conversation) !== answer) return;
    this.#save(conversation);
    if (answer.trouble?.kind === "refused") this.loadModels();
    if (conversation !== this.open) return;
    this.view.update();
    this.showContext();
    $("status").textContent = answer.trouble ? "" : this.view.spoken;
  }

  stop() {
    this.running?.stop();
  }

  /** Saves a conversation that the user has changed, which comes first in the list then. */
  keep(conversation) {
    conversation.updated = Date.now();
    this.#save(conversation);
  }

  #save(conversation) {
    if (isEmpty(conversation) && !conversation.revision) return; // it has never had anything in it
    const { id } = conversation;
    const saved = this.store.save(conversation);
    if (conversation.id !== id) toast("Another tab has changed this conversation: both are kept.");
    this.#saved.set(conversation, Date.now());
    if (conversation === this.open && location.hash.slice(1) !== conversation.id) {
      history.replaceState(null, "", `#${conversation.id}`);
    }
    if (!saved) toast("The browser’s storage is full: this is in this tab alone. Export it, or delete others.");
    this.sidebar.update();
  }

  #keepAll() {
    for (const [conversation, answer] of this.answers) if (!answer.done && answer.text) this.#save(conversation);
    if (this.view.editing) this.keep(this.open);
    if ($("settings").open) this.#keepSystem();
  }

  #keepSystem() {
    if (this.open.kind === "chat" && this.open.system !== this.#systemBefore) this.keep(this.open);
    this.#systemBefore = this.open.system;
  }

  #changedElsewhere(id) {
    for (const [conversation, answer] of this.answers) {
      if (answer.done && (id === null || conversation.id === id)) this.answers.delete(conversation);
    }
    this.sidebar.update();
    if (this.running || this.view.editing || $("settings").open || (id !== null && id !== this.open.id)) return;
    const fresh = this.store.read(this.open.id);
    if (fresh) this.show(fresh);
    else if (!isEmpty(this.open)) this.begin(); // it was deleted
  }

  #showDamaged(id) {
    this.show(newConversation("chat", ""));
    const save = () => download(new File([this.store.raw(id)], "damaged-conversation.txt"));
    const actions = { "Save what is there": save, Delete: () => this.remove(id) };
    $("log").prepend(card("This conversation was damaged in the browser’s storage.", actions));
  }

  remove(id) {
    const removed = this.#find(id);
    this.answers.get(removed)?.stop();
    this.answers.delete(removed);
    this.store.remove(id);
    if (id === this.open.id || id === location.hash.slice(1)) this.begin();
    this.sidebar.update();
    if (!removed) return;
    toast(`Deleted “${title(removed)}”.`, () => {
      this.keep({ ...removed, revision: "" });
      location.hash = id;
    });
  }

  // Models

  async loadModels() {
    const waits = () => notice(attempts.waiting && waitingCard(attempts));
    const attempts = new Attempts((message) => this.#askKey(message), waits);
    try {
      this.models = (await attempts.run(() => this.#server.models())) ?? [];
    } catch (trouble) {
      notice(card(trouble.message, { "Try again": () => this.loadModels() }));
      return;
    }
    notice(this.models.length ? null : card("The server has no model."));
    $("model").replaceChildren(...this.models.map(modelOption));
    if (isEmpty(this.open)) this.route();
    this.#showModel();
    this.view.update();
  }

  #chooseModel(id) {
    const { kind } = this.models.find((model) => model.id === id);
    if ((kind === "base") !== (this.open.kind === "text")) this.begin(id);
    else {
      this.open.model = id;
      if (this.open.revision) this.keep(this.open);
    }
    this.#showModel();
    this.view.focus();
  }

  #showModel() {
    $("model").value = this.model?.id ?? "";
    $("model").disabled = !this.models.length;
    this.showContext();
  }

  showContext() {
    const { prompt, tokens } = this.view.figures ?? {};
    const length = this.model?.context_length;
    $("context").hidden = !length || !prompt;
    if ($("context").hidden) return;
    const [used, all] = [prompt + tokens, length].map((count) => count.toLocaleString("en"));
    $("context-text").textContent = `${used} of ${all} tokens`;
    $("context-bar").firstChild.style.width = `${Math.min(100, (100 * (prompt + tokens)) / length)}%`;
    $("context").classList.toggle("full", prompt + tokens > 0.9 * length);
  }

  // Settings and keys

  #openSettings() {
    showDefaults(this.model);
    this.#systemBefore = this.open.system;
    $("settings").showModal();
  }

  /** Asks for the server's key; returns true where one was given. */
  #askKey(message) {
    this.#askingKey ??= new Promise((resolve) => {
      const dialog = $("key-dialog");
      $("key-message").textContent = message;
      $("key").value = this.#server.key;
      dialog.returnValue = "";
      dialog.onclose = () => {
        this.#askingKey = null;
        resolve(dialog.returnValue === "use");
      };
      dialog.showModal();
      $("key").select();
    });
    return this.#askingKey;
  }

  #useKey() {
    const key = $("key").value.trim();
    const usable = /^[!-~]+$/.test(key); // what a header can hold
    $("key-message").textContent = usable ? "" : "A key is made of letters, digits and signs.";
    if (!usable) return;
    this.#server.key = key;
    $("key-dialog").close("use");
  }

  #listen() {
    addEventListener("hashchange", () => this.route());
    addEventListener("pagehide", () => this.#keepAll());
    addEventListener("keydown", (event) => this.#pressed(event));
    for (const close of document.querySelectorAll(".close")) close.onclick = () => close.closest("dialog").close();
    $("model").onchange = () => this.#chooseModel($("model").value);
    $("settings-open").onclick = () => this.#openSettings();
    $("system").oninput = () => (this.open.system = $("system").value);
    $("settings").onclose = () => this.#keepSystem();
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      this.#useKey();
    };
    listenToPreferences();
  }

  #pressed(event) {
    const command = (event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey;
    if (document.querySelector("dialog[open]")) return;
    if (command && event.key.toLowerCase() === "k") {
      event.preventDefault();
      this.begin();
    } else if (event.key === "Escape" && !isComposing(event)) {
      if (!this.sidebar.toggle(false)) this.stop();
    }
  }
}

function notice(node) {
  $("notice").replaceChildren(...(node ? [node] : []));
}

function modelOption({ id, base, kind, predicts_prompts }) {
  const made = predicts_prompts ? "KV prediction for" : "adapter of";
  const about = [base && `${made} ${base}`, kind === "base" && "continues text"].filter(Boolean).join(", ");
  return element("option", { value: id }, about ? `${id} (${about})` : id);
}

new Page().start();
