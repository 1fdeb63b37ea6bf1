// The list of conversations: opened, deleted, brought from files and saved as files.

import { fromFile, isEmpty, title, toFile } from "./conversations.js";
import { $, download, element, iconButton, toast } from "./parts.js";

export class Sidebar {
  #page;
  #shown = "";
  #items = new Map(); // by id of the conversation: its item, which stays the same node

  constructor(page) {
    this.#page = page;
    $("new").onclick = () => page.begin();
    $("menu").onclick = () => this.toggle(true);
    $("shade").onclick = () => this.toggle(false);
    $("import").onclick = () => $("file").click();
    $("file").onchange = () => this.#import([...$("file").files]);
    $("export").onclick = () => this.#export();
  }

  /** Opens or closes it on a narrow screen. Returns whether it was open. */
  toggle(open) {
    const before = document.body.classList.contains("drawer");
    document.body.classList.toggle("drawer", open);
    $("menu").ariaExpanded = String(open);
    if (open) $("new").focus();
    return before;
  }

  update() {
    const { open, answers, store } = this.#page;
    document.title = open && !isEmpty(open) ? `${title(open)} – elm-mlx` : "elm-mlx";
    const running = [...answers].filter(([, answer]) => !answer.done).map(([{ id }]) => id);
    const state = (id) => ({ here: id === open?.id, running: running.includes(id) });
    const entries = store.list().map(({ id, title }) => ({ id, title, ...state(id) }));
    const shown = JSON.stringify(entries);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const focused = document.activeElement;
    const before = [...$("list").children];
    const at = before.findIndex((item) => item.contains(focused));
    const items = entries.map((entry) => this.#item(entry));
    this.#items = new Map(entries.map(({ id }, index) => [id, items[index]]));
    const moved = items.length !== before.length || items.some((item, index) => item !== before[index]);
    if (moved) $("list").replaceChildren(...items);
    if (at >= 0) (focused.isConnected ? focused : items[Math.min(at, items.length - 1)]?.firstChild)?.focus();
  }

  #item({ id, title, here, running }) {
    const item = this.#items.get(id) ?? this.#newItem(id);
    const [link, remove] = item.children;
    link.textContent = link.title = title;
    link.className = running ? "running" : "";
    link.ariaCurrent = here ? "page" : null;
    remove.ariaLabel = `Delete ${title}`;
    return item;
  }

  #newItem(id) {
    const link = element("a", { href: `#${id}` });
    link.addEventListener("click", () => this.toggle(false));
    return element("li", {}, link, iconButton("cross", "Delete", () => this.#page.remove(id)));
  }

  async #import(files) {
    const problems = [];
    for (const file of files) {
      try {
        const conversation = fromFile(file.name, await file.text(), this.#page.model?.id ?? "");
        this.#page.keep(conversation);
        location.hash = conversation.id;
      } catch (error) {
        problems.push(error.message);
      }
    }
    $("file").value = "";
    if (problems.length) setTimeout(() => toast(problems.join(" "))); // after what was opened is shown
  }

  #export() {
    if (isEmpty(this.#page.open)) toast("There is nothing to save yet.");
    else download(toFile(this.#page.open));
  }
}
