// A conversation as it is shown: messages, the answer that is being written, and what can be done with each.

import { toMessages } from "./conversations.js";
import { MarkdownView } from "./markdown.js";
import { $, button, card, copyText, element, figuresText, hideToast, icon, isComposing, sourcesList } from "./parts.js";
import { startOrStop, toast, waitingCard } from "./parts.js";

const NEAR = 48; // pixels from the end, within which the view goes along with an answer
const FIGURES_EVERY = 500; // milliseconds

export class ChatView {
  editing = false;
  #page;
  #conversation;
  #live = null; // what is written: {message, article, markdown, told, done}, told when its figures were shown
  #state = element("div", { className: "state" });
  #stateOf = null; // what it shows
  #following = true;
  #scroll = { top: 0, end: 0 }; // its position before

  constructor(page) {
    this.#page = page;
    startOrStop($("send"), page, () => this.#say());
    $("say").onkeydown = (event) => this.#typed(event);
    $("say").oninput = () => fit($("say"));
    $("log").onclick = (event) => this.#clicked(event.target);
    $("down").onclick = () => this.#follow(true);
    $("scroller").onscroll = () => this.#scrolled();
    new ResizeObserver(() => this.#follow(this.#following)).observe($("log"));
  }

  /** Of the last answer that has all of them. */
  get figures() {
    return this.#conversation.messages.findLast(({ figures }) => figures?.prompt)?.figures;
  }

  /** What a screen reader says when an answer is there. */
  get spoken() {
    return [...$("log").querySelectorAll(".assistant .body")].at(-1)?.innerText ?? "";
  }

  focus() {
    $("say").focus();
  }

  /** Shows a conversation, from its end on if it is `another` than before. */
  show(conversation, another = false) {
    this.#conversation = conversation;
    this.editing = false;
    this.#following ||= another;
    this.#render();
    this.update();
  }

  /** Shows what has changed since: the text of the answer, and how it stands with it. */
  update() {
    const { running } = this.#page;
    const answer = this.#page.answers.get(this.#conversation);
    const last = this.#conversation.messages.at(-1);
    if (answer && last?.role === "assistant") this.#write(last, answer);
    const [of, make] = this.#stateNow(answer, last);
    if (of !== this.#stateOf) this.#state.replaceChildren(...(of ? [make()] : []));
    this.#stateOf = of;
    $("log").classList.toggle("busy", Boolean(running));
    this.#showComposer(running);
    if (this.#following) this.#follow(true);
  }

  #write(message, answer) {
    if (this.#live?.message !== message) this.#live = this.#findOrAdd(message);
    const { article, markdown, told, done } = this.#live;
    if (done) return; // it stays as it is: a button of it may be pressed, or have the focus
    article.ariaBusy = String(!answer.done);
    markdown.update(message.content, !answer.done);
    if (!answer.done && performance.now() < told + FIGURES_EVERY) return;
    article.lastChild.replaceWith(this.#footer(message));
    Object.assign(this.#live, { told: performance.now(), done: answer.done });
  }

  /** The article of the last message, to go on in. */
  #findOrAdd(message) {
    const article = this.#article(message);
    const last = this.#state.previousElementSibling;
    if (last?.matches(".assistant")) last.replaceWith(article);
    else this.#state.before(article);
    return { message, article, markdown: new MarkdownView(article.querySelector(".body")), told: 0, done: false };
  }

  /** What stands below the messages: what it is of, for as long as which it may stay, and what makes it. */
  #stateNow(answer, last) {
    if (answer?.waiting) return [answer.waiting, () => waitingCard(answer.attempts, () => answer.stop())];
    if (answer && !answer.done) return last.role === "user" ? [answer, pending] : [null];
    if (answer?.trouble) return [answer.trouble, () => this.#troubleCard(answer.trouble)];
    if (!last) return [this.#page.model, () => this.#welcome()];
    if (last.role === "user") return [last, () => card("There is no answer yet.", { "Try again": () => this.#ask() })];
    return [null];
  }

  #troubleCard({ kind, message, param }) {
    const actions = { "Try again": () => this.#retry() };
    if (kind === "lost") return card(`${message} What had come is kept.`, actions);
    if (kind === "context") return this.#contextCard(message);
    if (param) actions.Settings = () => $("settings-open").click();
    return card(message, actions);
  }

  #contextCard(message) {
    const actions = { "New conversation": () => this.#page.begin() };
    const skip = this.#nextSkip();
    if (skip === null) return card(`${message} Shorten this message, or the system prompt.`, actions);
    return card(message, { "Leave out the oldest messages": () => this.#leaveOut(skip), ...actions });
  }

  /** How many messages to leave out so that about half of what was sent is left; null where only the last could go. */
  #nextSkip() {
    const { messages, skip } = this.#conversation;
    const all = messages.slice(skip).reduce((sum, { content }) => sum + content.length, 0);
    let next = null;
    let left = all;
    for (let index = skip; index < messages.length - 1 && left > all / 2; index++) {
      left -= messages[index].content.length;
      if (messages[index + 1].role === "user") next = index + 1;
    }
    return next;
  }

  #leaveOut(skip) {
    if (this.#lacksModel()) return;
    this.#conversation.skip = skip;
    this.#render();
    this.#ask();
  }

  #welcome() {
    const { id } = this.#page.model;
    const about = element("p", {}, `You are talking to ${id}. Conversations are kept in this browser.`);
    return element("div", { className: "welcome" }, element("h2", {}, "What is on your mind?"), about);
  }

  #render() {
    const { messages, skip } = this.#conversation;
    this.#live = null;
    const nodes = messages.map((message) => this.#article(message));
    if (skip) nodes.splice(skip, 0, element("p", { className: "divider" }, "The model no longer sees what is above"));
    $("log").replaceChildren(...nodes, this.#state);
  }

  #article(message) {
    const body = element("div", { className: "body" });
    const name = element("h2", { className: "unseen" }, message.role === "user" ? "You" : "Answer");
    if (message.role === "user") body.append(message.content);
    else new MarkdownView(body).update(message.content, false);
    return element("article", { className: message.role }, name, body, this.#footer(message));
  }

  #footer(message) {
    const { role, figures, finish, content, sources } = message;
    const tools = [button("Copy", ({ target }) => copyText(content, target))];
    tools.push(button("Edit", ({ target }) => this.#edit(message, target.closest("article"))));
    if (role === "user") tools.push(button("Delete", () => this.#delete(message)));
    else tools.push(button("Regenerate", () => this.#retry(), "again"));
    const parts = [element("div", { className: "tools" }, ...tools)];
    const text = figures && figuresText(figures, content ? this.#ending(figures, finish) : "ended without a word");
    if (text) parts.unshift(element("span", { className: "figures" }, text));
    if (finish && Array.isArray(sources)) parts.unshift(sourcesList(sources));
    return element("footer", {}, ...parts);
  }

  #ending({ prompt, tokens }, finish) {
    if (finish === "stopped") return "stopped";
    if (finish !== "length") return "";
    return prompt + tokens >= this.#page.model?.context_length ? "the context is full" : "cut at max tokens";
  }

  // What the user does

  #typed(event) {
    if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) {
      event.preventDefault();
      this.#say();
    } else if (event.key === "ArrowUp" && !$("say").value) {
      event.preventDefault();
      const asked = [...$("log").querySelectorAll("article.user")].at(-1);
      if (asked) this.#edit(this.#conversation.messages.findLast(({ role }) => role === "user"), asked);
    }
  }

  #say() {
    const content = $("say").value;
    if (!content.trim() || this.#page.running || !this.#page.model) return;
    $("say").value = "";
    fit($("say"));
    hideToast();
    const message = { role: "user", content };
    this.#conversation.messages.push(message);
    this.#state.before(this.#article(message));
    this.#ask();
  }

  /** Asks for an answer to the last message. */
  #ask(replaced = null) {
    const conversation = this.#conversation;
    if (this.#lacksModel()) return;
    conversation.model = this.#page.model.id;
    this.#following = true;
    this.#page.answers.delete(conversation);
    if (!replaced) this.#page.keep(conversation); // until something is said, what is replaced stays saved
    const body = { messages: toMessages(conversation) };
    this.#page.answer(conversation, "v1/chat/completions", body, (answer) => take(conversation, answer, replaced));
    this.focus();
  }

  /** Answers the last message anew. The answer that it has stays until something is said. */
  #retry() {
    if (this.#lacksModel()) return;
    const { messages } = this.#conversation;
    const replaced = messages.at(-1).role === "assistant" ? messages.at(-1) : null;
    this.#change(replaced && "The answer was replaced.", () => replaced && messages.pop());
    this.#ask(replaced);
  }

  #delete(message) {
    const { messages } = this.#conversation;
    const at = messages.indexOf(message);
    const count = messages[at + 1]?.role === "assistant" ? 2 : 1;
    this.#page.answers.delete(this.#conversation);
    this.#change("The message was deleted.", () => {
      messages.splice(at, count);
      if (this.#conversation.skip > at) this.#conversation.skip -= count;
    });
    this.#page.keep(this.#conversation);
    this.focus();
  }

  #edit(message, article) {
    if (this.#page.running) return;
    const asked = message.role === "user";
    const area = element("textarea", { value: message.content, ariaLabel: "Edit the message" });
    const close = () => (this.show(this.#conversation), this.focus());
    const done = () => {
      if (this.#page.running) return; // asked for since
      if (asked) this.#askInstead(message, area.value);
      else this.#rewrite(message, area.value);
    };
    area.oninput = () => fit(area);
    area.onkeydown = (event) => {
      if (isComposing(event)) return;
      if (event.key === "Escape") {
        event.stopPropagation(); // it stops no answer
        close();
      }
      if (event.key !== "Enter" || event.shiftKey) return;
      event.preventDefault();
      done();
    };
    const buttons = [button(asked ? "Send" : "Save", done, "primary"), button("Cancel", close)];
    const bar = element("div", { className: "tools" }, ...buttons);
    article.classList.add("edited");
    article.replaceChildren(area, bar);
    this.editing = true;
    fit(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  #askInstead(message, content) {
    if (!content.trim() || this.#lacksModel()) return;
    const { messages } = this.#conversation;
    const at = messages.indexOf(message);
    this.#change("The messages after this one were replaced.", () => {
      messages.splice(at, Infinity, { role: "user", content });
      if (this.#conversation.skip > at) this.#conversation.skip = 0; // else nothing would be sent
    });
    this.#ask();
  }

  #rewrite(message, content) {
    this.#change("The answer was changed.", () => Object.assign(message, { content }));
    this.#page.keep(this.#conversation);
    this.focus();
  }

  /** Makes a change to the messages that can be taken back. */
  #change(what, change) {
    const conversation = this.#conversation;
    const before = { messages: conversation.messages.map((message) => ({ ...message })), skip: conversation.skip };
    change();
    this.show(conversation);
    if (!what) return;
    toast(what, () => {
      this.#page.stop();
      this.#page.answers.delete(conversation);
      Object.assign(conversation, before);
      this.#page.keep(conversation);
      this.#page.show(conversation);
      this.focus();
    });
  }

  /** Whether there is none to ask, which is then said. */
  #lacksModel() {
    if (this.#page.model) return false;
    toast("No model for chats is served.");
    return true;
  }

  #clicked(target) {
    if (target.closest("summary")) this.#following = false; // what it opens stays in view
    if (target.matches(".copy")) copyText(target.closest("figure").querySelector("code").textContent, target);
  }

  #showComposer(running) {
    const send = $("send");
    const name = running ? "Stop" : "Send";
    if (send.ariaLabel !== name) send.replaceChildren(icon(running ? "square" : "arrow-up"));
    send.ariaLabel = name;
    send.title = running ? "Stop (Esc)" : "Send (Enter)";
    send.disabled = !running && !this.#page.model;
    $("say").placeholder = this.#page.models.length && !this.#page.model ? "No model for chats is served" : "Message";
  }

  // Scrolling

  #scrolled() {
    const { top, end } = position();
    const upwards = top < this.#scroll.top && end >= this.#scroll.end; // else what is shown has shrunk
    this.#following = end - top < (upwards ? 1 : NEAR);
    this.#scroll = { top, end };
    $("down").hidden = this.#following;
  }

  #follow(following) {
    this.#following = following;
    if (!following) return;
    $("scroller").scrollTop = $("scroller").scrollHeight;
    this.#scroll = position(); // what the user scrolls from, who may be sooner than the event of it
  }
}

/** Puts the text of an answer into its conversation. What it replaces comes back if nothing is said. */
function take(conversation, answer, replaced) {
  const { messages } = conversation;
  const said = answer.text.trim() || answer.finish === "stop";
  if (messages.at(-1).role === "user" && said) messages.push({ role: "assistant", content: "" });
  const last = messages.at(-1);
  const content = answer.done ? answer.text.trim() : answer.text.trimStart();
  const { figures, finish, sources } = answer;
  if (said) Object.assign(last, { content, figures, finish, ...(sources && { sources }) });
  else if (answer.done && replaced) messages.push(replaced);
}

/** Where the view stands, and where it could at most. */
function position() {
  const { scrollHeight, scrollTop, clientHeight } = $("scroller");
  return { top: scrollTop, end: scrollHeight - clientHeight };
}

const pending = () => element("p", { className: "pending" }, "Reading…");

/** Makes a textarea as high as its text, where the browser does not. */
function fit(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}
