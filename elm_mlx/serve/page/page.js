// The page: its conversations, models, settings and keys. `chat.js` shows a conversation, `text.js` a text to continue.

import { ChatView } from "./chat.js";
import { Conversations, fromFile, isEmpty, newConversation, storage, title, toFile } from "./conversations.js";
import { $, button, card, element, iconButton, waitingCard } from "./parts.js";
import { Answer, Attempts, Server } from "./requests.js";
import { TextView } from "./text.js";

const SAVE_EVERY = 2000; // milliseconds, while an answer is written
const THEMES = ["auto", "light", "dark"];

class Page {
  models = [];
  answers = new Map(); // by conversation: its latest Answer, until the next step
  open = null; // the conversation that is shown
  #server = new Server();
  #store = new Conversations((id) => this.#changedElsewhere(id));
  #saved = new WeakMap(); // by conversation: when, in milliseconds
  #askingKey = null;
  #painter = new Painter(() => this.view.update());

  constructor() {
    this.views = { chat: new ChatView(this), text: new TextView(this) };
  }

  get view() {
    return this.views[this.open.kind];
  }

  get running() {
    const answer = this.answers.get(this.open);
    return answer && !answer.done ? answer : null;
  }

  /** The model that answers here: the conversation's where it is served, otherwise one of its kind, if any. */
  get model() {
    const fitting = this.models.filter(({ kind }) => this.open.kind === "text" || kind !== "base");
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
    const live = [...this.answers.keys()].find((conversation) => conversation.id === id);
    const found = live ?? (id && this.#store.read(id));
    if (found) this.show(found);
    else if (id && this.#store.raw(id) !== null) this.#showDamaged(id);
    else this.begin();
  }

  /** Begins a conversation of the kind that the chosen model is for. It is saved with what is first said in it. */
  begin() {
    const chosen = this.models.find(({ id }) => id === $("model").value) ?? this.models[0];
    if (location.hash) history.pushState(null, "", location.pathname);
    this.show(newConversation(chosen?.kind === "base" ? "text" : "chat", chosen?.id ?? ""));
    this.view.focus();
  }

  show(conversation) {
    this.open = conversation;
    document.body.dataset.kind = conversation.kind;
    $("system").value = conversation.system;
    this.view.show(conversation);
    this.#showModel();
    this.#showList();
    this.#drawer(false);
    this.hideToast();
  }

  /** Starts an answer. `take(answer)` puts its text into the conversation, each time that there is more. */
  answer(conversation, path, body, take) {
    const changed = () => {
      if (this.answers.get(conversation) !== answer) return; // it was taken back
      take(answer);
      this.#keepNowAndThen(conversation);
      this.#repaint(conversation);
    };
    const askKey = (message) => this.#askKey(message);
    const answer = new Answer(this.#server, path, { ...body, ...readSettings() }, { askKey, changed });
    this.answers.set(conversation, answer);
    $("status").textContent = "Writing";
    answer.run().then(() => this.#finished(conversation, answer));
    this.view.update();
    this.#showList();
  }

  #finished(conversation, answer) {
    if (this.answers.get(conversation) !== answer) return;
    this.keep(conversation);
    $("status").textContent = answer.trouble ? "" : answer.finish === "stopped" ? "Stopped" : "Done";
    if (answer.trouble?.kind === "refused") this.loadModels();
    if (conversation === this.open) this.view.update();
    this.showContext();
  }

  stop() {
    this.running?.stop();
  }

  /** Saves a conversation, unless nothing is in it. */
  keep(conversation) {
    if (isEmpty(conversation)) return;
    conversation.updated = Date.now();
    const saved = this.#store.save(conversation);
    this.#saved.set(conversation, Date.now());
    if (conversation === this.open && location.hash.slice(1) !== conversation.id) {
      history.replaceState(null, "", `#${conversation.id}`);
    }
    if (!saved) this.toast("The browser’s storage is full: this is in this tab alone. Export it, or delete others.");
    this.#showList();
  }

  #keepNowAndThen(conversation) {
    if (Date.now() - (this.#saved.get(conversation) ?? 0) > SAVE_EVERY) this.keep(conversation);
  }

  #repaint(conversation) {
    if (conversation === this.open) this.#painter.request();
  }

  #changedElsewhere(id) {
    this.#showList();
    if (this.running || this.view.editing || (id !== null && id !== this.open.id)) return;
    const fresh = this.#store.read(this.open.id);
    if (fresh) this.show(fresh);
    else if (!isEmpty(this.open)) this.begin(); // it was deleted
  }

  #showDamaged(id) {
    this.show(newConversation("chat", ""));
    const save = () => download(new File([this.#store.raw(id)], "damaged-conversation.txt"));
    const actions = { "Save what is there": save, Delete: () => this.remove({ id }) };
    $("log").replaceChildren(card("This conversation was damaged in the browser’s storage.", actions));
  }

  remove({ id }) {
    const removed = this.#store.read(id);
    const shown = id === this.open.id || id === location.hash.slice(1);
    if (id === this.open.id) this.stop();
    this.answers.delete(this.open.id === id ? this.open : null);
    this.#store.remove(id);
    if (shown) this.begin();
    this.#showList();
    if (!removed) return;
    this.toast(`Deleted “${title(removed)}”.`, () => {
      this.keep({ ...removed, revision: "" });
      location.hash = id;
    });
  }

  // Models

  async loadModels() {
    const attempts = new Attempts((message) => this.#askKey(message), () => this.#notice(attempts));
    try {
      this.models = (await attempts.run(() => this.#server.models())) ?? [];
      this.#notice(this.models.length ? null : card("The server has no model."));
    } catch (trouble) {
      this.#notice(card(trouble.message, { "Try again": () => this.loadModels() }));
      return;
    }
    $("model").replaceChildren(...this.models.map(modelOption));
    if (isEmpty(this.open)) this.show(newConversation(this.models[0]?.kind === "base" ? "text" : "chat", ""));
    this.#showModel();
    this.view.update();
  }

  #notice(what) {
    const node = what instanceof Attempts ? what.waiting && waitingCard(what) : what;
    $("notice").replaceChildren(...(node ? [node] : []));
  }

  #chooseModel(id) {
    const { kind } = this.models.find((model) => model.id === id);
    const fits = (kind === "base") === (this.open.kind === "text");
    if (fits) this.open.model = id;
    else if (isEmpty(this.open)) this.show(newConversation(kind === "base" ? "text" : "chat", id));
    else this.begin();
    if (fits && this.open.revision) this.keep(this.open);
    this.#showModel();
    this.view.focus();
  }

  #showModel() {
    if (this.model) $("model").value = this.model.id;
    $("model").disabled = !this.models.length;
    this.showContext();
  }

  showContext() {
    const { model, view } = this;
    const used = view.figures?.tokens ? view.figures.prompt + view.figures.tokens : 0;
    $("context").hidden = !model?.context_length || !used;
    if ($("context").hidden) return;
    const share = Math.min(1, used / model.context_length);
    const [some, all] = [used, model.context_length].map((count) => count.toLocaleString("en"));
    $("context-text").textContent = `${some} of ${all} tokens`;
    $("context-bar").firstChild.style.width = `${100 * share}%`;
    $("context").classList.toggle("full", share > 0.9);
    $("context").title = "How much of the model’s context this takes";
  }

  // Conversations

  #showList() {
    const running = [...this.answers].filter(([, answer]) => !answer.done).map(([{ id }]) => id);
    const items = this.#store.list().map((entry) => this.#listItem(entry, running.includes(entry.id)));
    const focused = document.activeElement?.closest?.("#list a")?.hash;
    $("list").replaceChildren(...items);
    if (focused) $("list").querySelector(`a[href="${focused}"]`)?.focus();
    document.title = this.open && !isEmpty(this.open) ? `${title(this.open)} – elm-mlx` : "elm-mlx";
  }

  #listItem(entry, running) {
    const link = element("a", { href: `#${entry.id}`, title: entry.title }, entry.title);
    if (entry.id === this.open?.id) link.ariaCurrent = "page";
    if (running) link.classList.add("running");
    if (entry.id === this.open?.id) link.onclick = () => this.#drawer(false);
    return element("li", {}, link, iconButton("cross", `Delete ${entry.title}`, () => this.remove(entry)));
  }

  async #importFiles(files) {
    const problems = [];
    for (const file of files) {
      try {
        const conversation = fromFile(file.name, await file.text(), this.model?.id ?? "");
        this.keep(conversation);
        location.hash = conversation.id;
      } catch (error) {
        problems.push(error.message);
      }
    }
    $("file").value = "";
    if (problems.length) this.toast(problems.join(" "));
  }

  #export() {
    if (isEmpty(this.open)) this.toast("There is nothing to save yet.");
    else download(toFile(this.open));
  }

  // Settings and key

  #openSettings() {
    $("system-field").hidden = this.open.kind === "text";
    fillSettings();
    $("settings").showModal();
  }

  #askKey(message) {
    this.#askingKey ??= new Promise((resolve) => {
      $("key-message").textContent = message;
      $("key").value = this.#server.key;
      $("key-dialog").onclose = () => {
        this.#askingKey = null;
        resolve($("key-dialog").returnValue === "use");
      };
      $("key-dialog").returnValue = "";
      $("key-dialog").showModal();
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

  // What stands in the way, and goes by

  /** Says something at the foot of the page; `undo`, if given, takes back what was done. */
  toast(text, undo) {
    const buttons = [iconButton("cross", "Close", () => this.hideToast())];
    if (undo) buttons.unshift(button("Undo", () => (this.hideToast(), undo())));
    $("toast").replaceChildren(element("span", {}, text), ...buttons);
    $("toast").hidden = false;
  }

  hideToast() {
    $("toast").hidden = true;
  }

  #drawer(open) {
    document.body.classList.toggle("drawer", open);
    $("menu").ariaExpanded = String(open);
    if (open) $("new").focus();
  }

  #listen() {
    addEventListener("hashchange", () => this.route());
    addEventListener("pagehide", () => [...this.answers.keys()].forEach((conversation) => this.keep(conversation)));
    addEventListener("keydown", (event) => this.#key(event));
    const clicks = {
      new: () => this.begin(), menu: () => this.#drawer(true), shade: () => this.#drawer(false),
      import: () => $("file").click(), export: () => this.#export(), theme: nextTheme,
      "settings-open": () => this.#openSettings(), reset: resetSettings,
    };
    for (const [id, act] of Object.entries(clicks)) $(id).addEventListener("click", act);
    for (const close of document.querySelectorAll(".close")) close.onclick = () => close.closest("dialog").close();
    $("file").onchange = () => this.#importFiles([...$("file").files]);
    $("model").onchange = () => this.#chooseModel($("model").value);
    $("settings").oninput = (event) => event.target.name && saveSettings();
    $("system").oninput = () => (this.open.system = $("system").value);
    $("settings").onclose = () => this.open.kind === "chat" && this.keep(this.open);
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      this.#useKey();
    };
    showTheme();
  }

  #key(event) {
    if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      this.begin();
    } else if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) {
      if (document.body.classList.contains("drawer")) this.#drawer(false);
      else this.stop();
    }
  }
}

/** Calls `paint` once for all that is asked for in a frame, and leaves four times as long free as it takes. */
class Painter {
  #asked = false;
  #free = 0;

  constructor(paint) {
    this.paint = paint;
  }

  request() {
    if (this.#asked) return;
    this.#asked = true;
    setTimeout(() => requestAnimationFrame(() => this.#run()), Math.max(0, this.#free - performance.now()));
  }

  #run() {
    this.#asked = false;
    const start = performance.now();
    this.paint();
    const end = performance.now();
    this.#free = end + 4 * (end - start);
  }
}

function modelOption({ id, base, kind }) {
  const about = [base && `adapter of ${base}`, kind === "base" && "continues text"].filter(Boolean).join(", ");
  return element("option", { value: id }, about ? `${id} (${about})` : id);
}

function download(file) {
  const url = URL.createObjectURL(file);
  element("a", { href: url, download: file.name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// Settings

const SETTINGS = "elm-mlx/settings";
const inputs = () => [...document.querySelectorAll("#settings input")];

/** The sampling settings as fields of a request; what is not set is left to the model. */
function readSettings() {
  try {
    const found = JSON.parse(storage.getItem(SETTINGS)) ?? {};
    const set = inputs().filter(({ name }) => Number.isFinite(found[name]));
    return Object.fromEntries(set.map(({ name }) => [name, found[name]]));
  } catch {
    return {};
  }
}

function fillSettings() {
  const settings = readSettings();
  for (const input of inputs()) input.value = settings[input.name] ?? "";
}

function saveSettings() {
  const set = inputs().filter((input) => input.value !== "" && input.validity.valid);
  const settings = Object.fromEntries(set.map((input) => [input.name, input.valueAsNumber]));
  try {
    storage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // They hold while the page is open only where there is room; a conversation that cannot be saved says so.
  }
}

function resetSettings() {
  storage.removeItem(SETTINGS);
  fillSettings();
}

// Light and dark

const THEME = "elm-mlx/theme";

function showTheme() {
  const stored = storage.getItem(THEME);
  const theme = THEMES.includes(stored) ? stored : "auto";
  document.documentElement.dataset.theme = theme;
  $("theme").lastElementChild.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  $("theme").title = "Colours: as the system has them, light or dark";
  return theme;
}

function nextTheme() {
  const next = THEMES[(THEMES.indexOf(showTheme()) + 1) % THEMES.length];
  storage.setItem(THEME, next);
  showTheme();
}

new Page().start();
