// Markdown as DOM nodes, also while it is still being written.
//
// What a model writes is hostile. Nodes are made by createElement, text goes in as text, and HTML is text. Images
// become links; links lead to http and https alone, and show where. Quotes and lists nest to DEPTH, emphasis to
// EMPHASES, and no pattern goes back over more than a bounded part: no text makes a deep tree, or takes long.

import { element } from "./parts.js";

const DEPTH = 6;
const EMPHASES = 8;

const FENCE = /^ *(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: |$)/;
const RULE = /^ {0,3}([-*_]) *(?:\1 *){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( {1,4})(?! )| |$)/;
const TASK = /^\[([ xX])\] /;
const HALF = /^[-*+#>|`~: ]+$|^[ >]*\d{1,9}[.)]?$/; // what may become a mark is shown once it is known
const FROM_RIGHT = /^[^\p{L}]*[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}]/u;
const DELIMITER = /^:?-+:?$/;

/** Shows a text that grows: blocks that are complete are left alone, of the last one only what differs is touched. */
export class MarkdownView {
  #node;
  #from = 0; // where the first block begins that may still change
  #kept = 0; // how many of the node's children come before it

  constructor(node) {
    this.#node = node;
  }

  /** Shows `text`, which begins with all that was shown before. `open`: more is to come, so `**bo` is bold already. */
  update(text, open) {
    const lines = text.slice(this.#from).split("\n");
    const complete = lines.length - 1;
    if (open && HALF.test(lines[complete])) lines.pop();
    const blocks = parse(lines, 0, open);
    alignChildren(this.#node, blocks.map((block) => block.node), this.#kept);
    // Nothing that comes later changes what stands before a block whose first line is complete.
    const last = blocks.findLastIndex((block) => block.line < complete);
    if (last > 0) {
      this.#from += lines.slice(0, blocks[last].line).reduce((sum, line) => sum + line.length + 1, 0);
      this.#kept += last;
    }
  }
}

/** Makes the children of `parent` from number `start` on equal to `nodes`, and keeps those that are. */
function alignChildren(parent, nodes, start = 0) {
  const old = [...parent.childNodes].slice(start);
  nodes.forEach((node, index) => (index < old.length ? align(old[index], node) : parent.append(node)));
  old.slice(nodes.length).forEach((node) => node.remove());
}

function align(old, node) {
  if (!old.cloneNode(false).isEqualNode(node.cloneNode(false)) && !(isText(old) && isText(node))) old.replaceWith(node);
  else if (!isText(old)) alignChildren(old, [...node.childNodes]);
  else if (node.data.startsWith(old.data)) old.appendData(node.data.slice(old.data.length));
  else old.data = node.data;
}

const isText = (node) => node.nodeType === Node.TEXT_NODE;

/** The blocks of some lines, each as `{line, node}`: the number of its first line and what it is shown as. */
function parse(lines, depth, open) {
  const blocks = [];
  let line = 0;
  while (line < lines.length) {
    if (!lines[line].trim()) {
      line++;
      continue;
    }
    const [node, end] = block(lines, line, depth, open);
    blocks.push({ line, node });
    line = end;
  }
  return blocks;
}

const nodes = (lines, depth, open) => parse(lines, depth, open).map((block) => block.node);

/** The block that begins in line `at`, and the line after it. */
function block(lines, at, depth, open) {
  const line = lines[at];
  if (FENCE.test(line)) return fence(lines, at);
  if (HEADING.test(line)) return [heading(line, open && at === lines.length - 1), at + 1];
  if (RULE.test(line)) return [element("hr"), at + 1];
  if (depth < DEPTH && QUOTE.test(line)) return quote(lines, at, depth, open);
  if (depth < DEPTH && ITEM.test(line)) return list(lines, at, depth, open);
  if (isTable(lines, at)) return table(lines, at, open);
  return paragraph(lines, at, open);
}

/** True where line `at` begins a block of its own right after a paragraph's line. */
function interrupts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line); // "in / 1984. It" is no list
  return (
    FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || isTable(lines, at) ||
    (item !== null && line.length > item[0].length && (item[2].length === 1 || /^1[.)]$/.test(item[2])))
  );
}

function fence(lines, at) {
  const [, mark, info] = FENCE.exec(lines[at]);
  const indent = lines[at].indexOf(mark);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], mark)) end++;
  const code = lines.slice(at + 1, end).map((line) => dedented(line, indent)).join("\n");
  const language = info.trim().split(/\s/, 1)[0];
  const copy = element("button", { type: "button", className: "copy" }, "Copy");
  const bar = element("figcaption", {}, language || "text", copy);
  return [element("figure", {}, bar, element("pre", { tabIndex: 0 }, element("code", {}, code))), end + 1];
}

function closes(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

function dedented(line, width) {
  const spaces = line.length - line.trimStart().length;
  return line.slice(Math.min(width, spaces));
}

function heading(line, open) {
  const level = HEADING.exec(line)[1].length;
  const text = line.trim().slice(level).replace(/(^| )#+$/, "").trim();
  // The page's own headings are h1 and h2.
  return element(`h${Math.min(6, level + 2)}`, { className: `level${level}` }, ...inline(text, open));
}

function quote(lines, at, depth, open) {
  const inner = [];
  let end = at;
  for (; end < lines.length && lines[end].trim(); end++) {
    if (!QUOTE.test(lines[end]) && interrupts(lines, end)) break;
    inner.push(lines[end].replace(QUOTE, ""));
  }
  return [element("blockquote", {}, ...nodes(inner, depth + 1, open && end === lines.length)), end];
}

function list(lines, at, depth, open) {
  const [, { length: base }, mark] = ITEM.exec(lines[at]);
  const ordered = mark.length > 1;
  const items = [];
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (!found || found[1].length > base + 1 || RULE.test(lines[end]) || found[2].length > 1 !== ordered) break;
    const next = itemEnd(lines, end, base);
    items.push(itemLines(lines.slice(end, next), found));
    end = next;
    while (next < lines.length && end < lines.length && !lines[end].trim()) end++;
  }
  const unfinished = open && end === lines.length ? items.length - 1 : -1;
  const made = items.map((item, index) => listItem(item, depth, index === unfinished));
  // Paragraphs find their direction by CSS; a list's is that of its marks too.
  const properties = { ...(ordered && { start: parseInt(mark) }), ...(FROM_RIGHT.test(items[0][0]) && { dir: "rtl" }) };
  return [element(ordered ? "ol" : "ul", properties, ...made), end];
}

/** The line after the item that begins in line `at`: what is indented is part of it, and the rest of its paragraph. */
function itemEnd(lines, at, base) {
  let fenced = FENCE.exec(lines[at].replace(ITEM, ""))?.[1];
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end];
    const indented = /^ */.exec(line)[0].length > base + 1;
    if (fenced) {
      if (closes(line, fenced)) fenced = undefined;
    } else if (!line.trim()) {
      continue;
    } else if (indented) {
      fenced = FENCE.exec(line)?.[1];
    } else if (!lines[end - 1].trim() || interrupts(lines, end) || ITEM.test(line)) {
      break;
    }
  }
  while (end > at + 1 && !lines[end - 1].trim()) end--;
  return end;
}

function itemLines(lines, [marker]) {
  return [lines[0].slice(marker.length), ...lines.slice(1).map((line) => dedented(line, marker.length))];
}

function listItem(lines, depth, open) {
  const task = TASK.exec(lines[0]);
  if (task) lines[0] = (task[1] === " " ? "☐ " : "☑ ") + lines[0].slice(4);
  return element("li", {}, ...nodes(lines, depth + 1, open));
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !/^[ |:-]+$/.test(lines[at + 1])) return false;
  const marks = cells(lines[at + 1]);
  return marks.length === cells(lines[at]).length && marks.every((mark) => DELIMITER.test(mark));
}

function cells(line) {
  const text = line.trim();
  const found = text.split(/(?<!\\)\|/).map((cell) => cell.replaceAll("\\|", "|").trim());
  if (text.startsWith("|")) found.shift();
  if (found.length > 1 && found.at(-1) === "") found.pop();
  return found;
}

function table(lines, at, open) {
  const sides = cells(lines[at + 1]).map((mark) => (mark.endsWith(":") ? (mark[0] === ":" ? "center" : "right") : ""));
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const unfinished = open && end === lines.length ? end - 1 : -1;
  const head = row(lines[at], "th", sides, false);
  const rows = lines.slice(at + 2, end).map((line, index) => row(line, "td", sides, at + 2 + index === unfinished));
  const node = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  return [element("div", { className: "scroll", tabIndex: 0 }, node), end];
}

function row(line, tag, sides, open) {
  const texts = cells(line);
  const cell = (side, index) => element(tag, { className: side }, ...inline(texts[index] ?? "", open));
  return element("tr", {}, ...sides.map(cell));
}

function paragraph(lines, at, open) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
  // A line's end is shown as one (white-space: pre-line), as poems and addresses need it.
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [element("p", {}, ...inline(text, open && end === lines.length)), end];
}

const LABEL = String.raw`!?\[([^[\]\n]{1,500})\]`;
const TARGET = String.raw`<?(https?:\/\/[^\s<>()]{1,2000}(?:\([^\s<>()]{0,200}\)[^\s<>()]{0,200})?)>?`;
const LINK = String.raw`${LABEL}\(${TARGET}(?: +"[^"\n]{0,200}")?\)`;
const BARE = String.raw`<?(https?:\/\/[^\s<>"\x60]{1,2000})>?`;
const TOKEN = new RegExp(String.raw`\\([!-'*-/:-@^_\x60{-~])|(\x60+)|(\*+|_+|~~)|${LINK}|${BARE}`, "g");

/** The nodes of a text with code, emphasis and, if `links`, links. `open`: what is not closed is so at its end. */
function inline(text, open = false, links = true) {
  const marks = new Marks();
  const missing = new Set(); // runs of backticks that nothing closes
  const all = open ? text.replace(/[*_~`]{1,3}$/, "") : text; // what may be half a mark is shown once it is known
  let at = 0;
  for (let match; (match = after(TOKEN, all, at)); ) {
    marks.text(all.slice(at, match.index));
    at = match.index + match[0].length;
    const [whole, escaped, ticks, run, label, target, url] = match;
    if (escaped) marks.text(escaped);
    else if (run) marks.run(run, all[match.index - 1] ?? " ", all[at] ?? " ");
    else if (ticks) at = code(marks, all, at, ticks, missing, open);
    else if (!links) marks.text(whole);
    else if (target) marks.add(link(target, label));
    else at -= bareLink(marks, whole, url);
  }
  marks.text(all.slice(at));
  return marks.finish(open);
}

function after(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** Adds the code that begins at `at`, or its ticks where nothing closes it. Returns where to go on. */
function code(marks, text, at, ticks, missing, open) {
  const end = missing.has(ticks) ? -1 : closingTicks(text, at, ticks);
  if (end < 0) missing.add(ticks);
  if (end < 0 && !(open && ticks.length === 1)) {
    marks.text(ticks);
    return at;
  }
  const inner = end < 0 ? text.slice(at) : text.slice(at, end);
  const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
  marks.add(element("code", {}, padded ? inner.slice(1, -1) : inner));
  return end < 0 ? text.length : end + ticks.length;
}

function closingTicks(text, at, ticks) {
  for (let end = text.indexOf(ticks, at); end >= 0; end = text.indexOf(ticks, end)) {
    let after = end;
    while (text[after] === "`") after++;
    if (after - end === ticks.length) return end;
    end = after;
  }
  return -1;
}

/** Adds a URL that stands by itself. Returns how many characters at its end belong to the text around it. */
function bareLink(marks, whole, url) {
  let end = url.length;
  while (".,;:!?'*_~]".includes(url[end - 1]) || (url[end - 1] === ")" && !url.slice(0, end).includes("("))) end--;
  const bracketed = whole[0] === "<" && whole.endsWith(">");
  if (bracketed) end = url.length;
  else if (whole[0] === "<") marks.text("<");
  const target = url.slice(0, end);
  marks.add(link(target, target));
  return bracketed ? 0 : whole.length - end - (whole[0] === "<");
}

/** A link whose text does not hide where it leads; the text alone where that is nowhere. */
function link(target, label) {
  if (!URL.canParse(target)) return label;
  const { href, host } = new URL(target);
  const apart = { target: "_blank", rel: "noopener noreferrer nofollow", referrerPolicy: "no-referrer" };
  const node = element("a", { href, title: href, ...apart }, ...inline(label, false, false));
  if (label !== target && label !== host) node.append(element("span", { className: "host" }, ` (${host})`));
  return node;
}

/** Emphasis as it opens and closes: a stack of what is open, each with the nodes in it. */
class Marks {
  #open = [{ mark: "", nodes: [] }];

  text(text) {
    if (!text) return;
    const { nodes } = this.#open.at(-1);
    if (typeof nodes.at(-1) === "string") nodes.push(nodes.pop() + text);
    else nodes.push(text);
  }

  add(node) {
    this.#open.at(-1).nodes.push(node);
  }

  /** Takes a run of `*`, `_` or `~`, between the characters `before` and `after`. */
  run(run, before, after) {
    const inWord = run[0] === "_" && /\w/.test(before) && /\w/.test(after);
    let left = run.length;
    while (left && !inWord && /\S/.test(before)) {
      const index = this.#closable(run[0], left);
      if (index < 0) break;
      left -= this.#open[index].mark.length;
      this.#close(index, true);
    }
    while (left && !inWord && /\S/.test(after) && this.#open.length <= EMPHASES) {
      const mark = run[0].repeat(Math.min(left, 2));
      this.#open.push({ mark, nodes: [] });
      left -= mark.length;
    }
    this.text(run.slice(0, left));
  }

  /** The number of what `left` characters of a run close, -1 where that is nothing: best what is as long. */
  #closable(character, left) {
    const of = (fits) => this.#open.findLastIndex(({ mark }) => mark[0] === character && fits(mark.length));
    const exact = of((length) => length === left);
    return exact < 0 ? of((length) => length < left) : exact;
  }

  finish(open) {
    while (this.#open.length > 1) {
      const { mark, nodes } = this.#open.at(-1);
      this.#close(this.#open.length - 1, open && mark.length === 2 && nodes.length > 0);
    }
    return this.#open[0].nodes;
  }

  /** Closes what is open from number `index` on. If `closed`, that one was closed in the text; all others are text. */
  #close(index, closed) {
    while (this.#open.length > index) {
      const { mark, nodes } = this.#open.pop();
      if (closed && this.#open.length === index && nodes.length) {
        this.add(element(mark[0] === "~" ? "s" : mark.length > 1 ? "strong" : "em", {}, ...nodes));
      } else {
        this.text(mark);
        for (const node of nodes) typeof node === "string" ? this.text(node) : this.add(node);
        if (closed && this.#open.length === index) this.text(mark);
      }
    }
  }
}
