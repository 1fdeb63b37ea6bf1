// Parts that the page is made of.

export const $ = (id) => document.getElementById(id);

/** An element with properties (`onclick`) or attributes (`aria-label`), and children, of which strings are text. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#${name}`);
  svg.append(use);
  return svg;
}

export function button(text, act, className = "") {
  return element("button", { type: "button", className, onclick: act }, text);
}

export function iconButton(name, ariaLabel, onclick) {
  return element("button", { type: "button", className: "icon", ariaLabel, onclick }, icon(name));
}

/** Makes a button stop the answer that `page` is at, or else `start` one: what it showed when it was pressed. */
export function startOrStop(node, page, start) {
  let pressed = null;
  let last = {}; // what the last click did
  node.onpointerdown = () => (pressed = page.running);
  node.onclick = ({ detail }) => {
    const { running } = page;
    const undoes = running ? running === last.begun : last.stopped;
    if (detail > 0 && pressed !== running) return;
    if (detail === 2 && undoes) return; // the rest of a double click
    last = { stopped: Boolean(running) };
    if (running) page.stop();
    else {
      start();
      last.begun = page.running;
    }
  };
}

/** Whether a key is one of an input method's; Safari says so of the key that ends its work by the code alone. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** A box that says what is wrong, with a button for each of what can be done. */
export function card(text, actions = {}) {
  const buttons = Object.entries(actions).map(([name, act]) => button(name, act));
  return element("div", { className: "card", role: "alert" }, element("p", {}, text), ...buttons);
}

/** A box that says what is waited for, and counts the seconds. */
export function waitingCard(attempts, cancel) {
  const { message, until } = attempts.waiting;
  const left = element("span", { ariaHidden: "true" });
  const tick = () => {
    left.textContent = ` in ${Math.max(0, Math.ceil((until - Date.now()) / 1000))} s`;
    if (attempts.waiting?.until === until) setTimeout(tick, 500);
  };
  tick();
  const node = card(message, { "Try now": () => attempts.tryNow(), ...(cancel && { Cancel: cancel }) });
  node.firstChild.append(" Trying again", left, ".");
  return node;
}

/** Copies a text, and says so on the button `from`. */
export function copyText(text, from) {
  const done = () => {
    from.textContent = "Copied";
    setTimeout(() => (from.textContent = "Copy"), 1500);
  };
  const bySelection = () => copyBySelection(text) && done(); // as it goes without https, or where the browser refuses
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, bySelection);
  else bySelection();
}

function copyBySelection(text) {
  const area = element("textarea", { className: "unseen", value: text });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus({ preventScroll: true });
  return copied;
}

/** Says something at the foot of the page; `undo`, if given, takes back what was done. */
export function toast(text, undo) {
  const buttons = [iconButton("cross", "Close", hideToast)];
  if (undo) buttons.unshift(button("Undo", () => (hideToast(), undo())));
  $("toast").replaceChildren(element("span", {}, text), ...buttons);
  $("toast").hidden = false;
}

export function hideToast() {
  $("toast").hidden = true;
}

export function download(file) {
  const url = URL.createObjectURL(file);
  element("a", { href: url, download: file.name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Calls `paint` once for all that is asked for in a frame, and leaves four times as long free as it takes. */
export class Painter {
  #asked = false;
  #free = 0; // when it may paint again

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

export function figuresText({ tokens, rate, first }, ending) {
  const parts = [];
  if (tokens) parts.push(`${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`);
  if (rate > 0) parts.push(`${Number(rate).toFixed(rate < 10 ? 1 : 0)} tokens/s`);
  if (first > 0) parts.push(`first after ${Number(first).toFixed(first < 1 ? 2 : 1)} s`);
  if (ending) parts.push(ending);
  return parts.join(" · ");
}

/** The passages of documents that an answer was given, each with its place; its text is shown on demand. */
export function sourcesList(sources) {
  if (!sources.length) return element("p", { className: "sources" }, "Nothing was found in the documents.");
  const items = sources.map(({ number, file, first_line: line, first_page: page, heading, text }) => {
    const place = `[${number}] ${file}${page ? `, page ${page}` : `:${line}`}${heading ? ` (${heading})` : ""}`;
    return element("details", {}, element("summary", {}, place), element("p", {}, String(text)));
  });
  return element("div", { className: "sources" }, ...items);
}
