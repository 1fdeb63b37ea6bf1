// A text that a base model continues, in place.

import { $, card, element, figuresText, hideToast, startOrStop, waitingCard } from "./parts.js";

export class TextView {
  editing = false; // typed since it was last saved
  #page;
  #conversation;
  #continued = new WeakMap(); // by conversation: [from, to] of each continuation that can be taken back
  #stateOf = null;
  #saving = 0;

  constructor(page) {
    this.#page = page;
    startOrStop($("continue"), page, () => this.#continue());
    $("undo").onclick = () => this.#undo();
    $("another").onclick = () => this.#undo() && this.#continue();
    $("text").oninput = () => this.#typed();
    $("text").onkeydown = (event) => this.#key(event);
  }

  get figures() {
    return this.#conversation.figures;
  }

  get #pieces() {
    if (!this.#continued.has(this.#conversation)) this.#continued.set(this.#conversation, []);
    return this.#continued.get(this.#conversation);
  }

  /** What a screen reader says when a continuation is there. */
  get spoken() {
    return this.#conversation.text.slice(...(this.#pieces.at(-1) ?? [0, 0]));
  }

  focus() {
    $("text").focus();
  }

  /** Shows a text, from its end on if it is `another` than before. */
  show(conversation, another = false) {
    this.#conversation = conversation;
    this.editing = false;
    this.update();
    if (another) $("scroller").scrollTop = $("scroller").scrollHeight;
  }

  update() {
    const { running, model } = this.#page;
    const answer = this.#page.answers.get(this.#conversation);
    const near = $("scroller").scrollHeight - $("scroller").scrollTop - $("scroller").clientHeight < 48;
    this.#showText();
    this.#showState(answer);
    $("text").readOnly = Boolean(running);
    $("continue").textContent = running ? "Stop" : "Continue";
    $("continue").disabled = !running && !(model && this.#conversation.text);
    $("another").disabled = $("undo").disabled = Boolean(running) || !this.#pieces.length;
    if (answer && near) $("scroller").scrollTop = $("scroller").scrollHeight;
  }

  /** The text, and below it a copy that gives it its height and marks what was written last. */
  #showText() {
    const { text } = this.#conversation;
    if ($("text").value !== text) $("text").value = text;
    const [from, to] = this.#pieces.at(-1) ?? [text.length, text.length];
    const parts = [text.slice(0, from), text.slice(from, to), `${text.slice(to)}\n`];
    if (!$("shadow").firstChild) $("shadow").append("", element("mark", {}, ""), "");
    [...$("shadow").childNodes].forEach((node, index) => {
      if (node.textContent !== parts[index]) node.textContent = parts[index];
    });
  }

  #showState(answer) {
    $("text-figures").textContent = this.figures ? figuresText(this.figures, this.#ending()) : "";
    const state = answer?.waiting ?? answer?.trouble;
    if (state === this.#stateOf) return; // it is shown
    this.#stateOf = state;
    $("text-state").replaceChildren(...this.#stateNodes(answer));
  }

  #stateNodes(answer) {
    if (answer?.waiting) return [waitingCard(answer.attempts, () => answer.stop())];
    if (answer?.trouble) return [this.#troubleCard(answer.trouble)];
    return [];
  }

  #ending() {
    const { skip } = this.#conversation;
    const stopped = this.figures.finish === "stopped" ? "stopped" : "";
    return skip ? `${stopped} beginning ${skip.toLocaleString("en")} characters into the text`.trim() : stopped;
  }

  #troubleCard({ kind, message, param }) {
    const actions = { "Try again": () => this.#continue() };
    if (kind === "lost") return card(`${message} What had come is kept.`, { Continue: () => this.#continue() });
    if (param) actions.Settings = () => $("settings-open").click();
    return card(message, actions);
  }

  /** Continues the text; from its second half alone, begun at a line or word, where all of it is too long. */
  async #continue() {
    const conversation = this.#conversation;
    const { trouble } = (await this.#write(conversation)) ?? {};
    const left = conversation.text.length - conversation.skip;
    if (trouble?.kind !== "context" || left < 2 || conversation !== this.#conversation) return;
    const half = conversation.skip + Math.ceil(left / 2);
    const near = conversation.text.slice(half, half + 200);
    const start = near.includes("\n") ? near.indexOf("\n") + 1 : near.search(/\s/);
    conversation.skip = half + Math.max(0, start);
    this.#continue();
  }

  async #write(conversation) {
    const { model } = this.#page;
    if (this.#page.running || !model || !conversation.text) return null;
    const before = conversation.text;
    const pieces = this.#pieces;
    const piece = [before.length, before.length];
    conversation.model = model.id;
    hideToast();
    this.#page.keep(conversation);
    const body = { prompt: before.slice(conversation.skip) };
    this.focus();
    return this.#page.answer(conversation, "v1/completions", body, (answer) => {
      conversation.text = before + answer.text;
      piece[1] = conversation.text.length;
      if (answer.text && pieces.at(-1) !== piece) pieces.push(piece);
      conversation.figures = { ...answer.figures, finish: answer.finish };
    });
  }

  /** Takes back the last continuation. Returns false where there is none. */
  #undo() {
    const conversation = this.#conversation;
    const piece = this.#page.running ? null : this.#pieces.pop();
    if (!piece) return false;
    conversation.text = conversation.text.slice(0, piece[0]) + conversation.text.slice(piece[1]);
    conversation.figures = null;
    this.#page.answers.delete(conversation);
    this.#page.keep(conversation);
    this.update();
    this.focus();
    return true;
  }

  #typed() {
    const conversation = this.#conversation;
    const text = $("text").value;
    const whole = this.#pieces.filter(([, to]) => text.startsWith(conversation.text.slice(0, to)));
    this.#continued.set(conversation, whole); // one that was edited is the user's
    conversation.text = text;
    conversation.skip = 0;
    this.editing = true;
    clearTimeout(this.#saving);
    this.#saving = setTimeout(() => this.#save(conversation), 500);
    this.update();
  }

  #save(conversation) {
    this.editing = false;
    this.#page.keep(conversation);
  }

  #key(event) {
    const command = event.ctrlKey || event.metaKey;
    if (event.key === "Enter" && command) {
      event.preventDefault();
      this.#continue();
    } else if (event.key.toLowerCase() === "z" && command && !event.shiftKey && this.#isAtPiece()) {
      event.preventDefault();
      this.#undo();
    }
  }

  /** True where a continuation is the last that was done to the text. */
  #isAtPiece() {
    return this.#pieces.at(-1)?.[1] === this.#conversation.text.length;
  }
}
