// The list of conversations: opened, deleted, brought from files and saved as files.

import { fromFile, isEmpty, title, toFile } from "./conversations.js";
import { $, download, element, iconButton, toast } from "./parts.js";

export class Sidebar {
  #page;
  #shown = "";

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
    const focused = document.activeElement?.hash;
    const items = entries.map((entry) => this.#item(entry));
    $("list").replaceChildren(...items);
    if (focused) items.find((item) => item.firstChild.hash === focused)?.firstChild.focus();
  }

  #item({ id, title, here, running }) {
    const link = element("a", { href: `#${id}`, title, className: running ? "running" : "" }, title);
    if (here) link.ariaCurrent = "page";
    link.addEventListener("click", () => this.toggle(false));
    return element("li", {}, link, iconButton("cross", `Delete ${title}`, () => this.#page.remove(id)));
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
