// One model's column: its thread, the answer in progress, and what the reader does with the messages.

import { chat, goOn, spelled, tokenId, unfolded } from "./answer.js";
import { ApiError } from "./api.js";
import { icon, node } from "./dom.js";
import { showMessage } from "./message.js";
import { hide } from "./tokens.js";
import { append, choose, path, shownAfter, siblings, takeBack } from "./tree.js";

const STARTERS = [
  "Explain why the sky is blue in two sentences.",
  "Name three uses of a water wheel.",
  "Write a short poem about grain.",
];

export class Column {
  // `page` has ask() -> {system, settings, wantsTokens} or null where a setting is wrong, models(), changed(column),
  // failed(error), edit(column, place, text), send(text) and close(column).
  constructor(thread, page) {
    this.thread = thread;
    this.page = page;
    this.running = null; // AbortController of the answer in progress
    this.failure = null;
    this.select = node("select");
    this.select.title = "Model";
    this.select.setAttribute("aria-label", "Model");
    this.select.addEventListener("change", () => {
      this.thread.model = this.select.value;
      this.render();
      page.changed(this);
    });
    this.closer = icon("close", "Remove this column", () => page.close(this));
    this.log = node("div", "messages");
    this.log.setAttribute("role", "log");
    this.log.setAttribute("aria-label", "Conversation");
    this.empty = node("div", "empty");
    this.scroller = node("div", "scroller", this.log, this.empty);
    // Whoever reads the end stays there when the text or the window changes; whoever scrolled up is left in peace.
    let following = true;
    this.scroller.addEventListener("scroll", () => (following = this.isAtEnd()));
    const observer = new ResizeObserver(() => following && this.scrollDown());
    observer.observe(this.scroller);
    observer.observe(this.log);
    this.element = node("section", "column", node("div", "column-head", this.select, this.closer), this.scroller);
    this.element.id = `column-${Math.random().toString(36).slice(2)}`;
  }

  showModels() {
    const names = this.page.models();
    const { model } = this.thread;
    const options = names.includes(model) ? names : [model, ...names].filter(Boolean);
    const label = (name) => (names.length === 0 || names.includes(name) ? name : `${name} (not served)`);
    this.select.replaceChildren(...options.map((name) => new Option(label(name), name)));
    this.select.value = model;
  }

  render() {
    hide();
    const focused = this.focusedControl();
    const { model } = this.thread;
    const shown = path(this.thread);
    this.element.setAttribute("aria-label", model || "No model");
    this.showModels();
    this.log.replaceChildren(...shown.map((index, place) => this.message(index, place === shown.length - 1)));
    this.log.hidden = shown.length === 0 && !this.failure;
    this.empty.hidden = shown.length > 0;
    this.empty.replaceChildren(...(shown.length ? [] : this.welcome()));
    if (this.failure) {
      this.log.append(node("p", "failure", this.failure));
      this.log.lastChild.setAttribute("role", "alert");
    }
    this.refocus(focused);
  }

  welcome() {
    const starters = STARTERS.map((text) => {
      const element = node("button", "starter", text);
      element.type = "button";
      element.addEventListener("click", () => this.page.send(text));
      return element;
    });
    const who = node("strong", "", this.thread.model || "the model");
    return [
      node("h2", "", "What shall we talk about?"),
      node("p", "", "Answers come from ", who, " on this server. The conversation stays in this browser."),
      node("div", "starters", ...starters),
    ];
  }

  message(index, isLast) {
    const { nodes } = this.thread;
    const message = nodes[index];
    const branches = siblings(this.thread, index);
    const streaming = this.running !== null && isLast;
    const view = showMessage(message, {
      streaming,
      tokens: this.page.wantsTokens(),
      editable: !this.running,
      place: { index: branches.indexOf(index), count: branches.length },
      actions: this.actions(index, branches, isLast),
    });
    view.element.dataset.index = index;
    if (streaming) this.view = view;
    return view.element;
  }

  actions(index, branches, isLast) {
    const message = this.thread.nodes[index];
    return {
      edit: (text) => this.page.edit(this, path(this.thread).indexOf(index), text),
      cancel: () => this.render(),
      regenerate: () => this.answer(message.parent),
      answer: isLast ? () => this.answer(index) : null,
      step: (by) => this.show(branches[branches.indexOf(index) + by]),
      branch: (position, alternative) => this.branch(index, position, alternative),
      giveResult: isLast ? (id, text) => this.giveResult(id, text) : null,
    };
  }

  show(index) {
    if (this.running) return;
    choose(this.thread, index);
    this.failure = null;
    this.render();
    this.page.changed(this);
  }

  send(text) {
    if (this.running) return;
    const last = path(this.thread).at(-1) ?? -1;
    this.answer(append(this.thread, last, { role: "user", content: text }));
  }

  // The message at this place of the path becomes a branch with other words.
  edit(place, text) {
    if (this.running) return;
    const { parent } = this.thread.nodes[path(this.thread)[place]];
    this.answer(append(this.thread, parent, { role: "user", content: text }));
  }

  giveResult(toolCallId, content) {
    const shown = path(this.thread).map((index) => this.thread.nodes[index]);
    const last = append(this.thread, path(this.thread).at(-1), { role: "tool", content, toolCallId });
    const calls = shown.findLast(({ toolCalls }) => toolCalls)?.toolCalls ?? [];
    const given = shown.filter(({ role }) => role === "tool").map((result) => result.toolCallId);
    if (calls.every(({ id }) => id === toolCallId || given.includes(id))) this.answer(last);
    else this.render();
  }

  answer(parent) {
    return this.run(parent, { role: "assistant", model: this.thread.model, content: "" }, chat);
  }

  async branch(index, position, alternative) {
    if (this.running) return;
    const { parent, model, tokens, reasoning } = this.thread.nodes[index];
    try {
      const id = alternative.id ?? (await tokenId(model, alternative.text));
      const start = [...tokens.slice(0, position), { ...alternative, id, top: tokens[position].top }];
      if (start.some((token) => token.id === undefined))
        throw new ApiError("The server did not tell the ids of these tokens.");
      const words = unfolded(spelled(start), reasoning !== undefined);
      await this.run(parent, { role: "assistant", model, tokens: start, ...words }, goOn);
    } catch (error) {
      this.fail(error);
      this.render();
    }
  }

  async run(parent, fresh, work) {
    const ask = this.page.ask();
    if (this.running || !ask) return;
    const before = shownAfter(this.thread, parent);
    const answer = this.thread.nodes[append(this.thread, parent, fresh)];
    const { signal } = (this.running = new AbortController());
    this.failure = null;
    this.render();
    this.page.changed(this);
    this.scrollDown();
    try {
      await work(this.thread, parent, answer, ask, signal, () => this.refreshSoon());
    } catch (error) {
      if (signal.aborted) answer.facts = "stopped";
      else this.fail(error, answer);
    }
    this.running = null;
    const isEmpty = !answer.content && !answer.reasoning && !answer.toolCalls;
    if (isEmpty && (signal.aborted || this.failure)) takeBack(this.thread, before);
    else if (isEmpty) answer.failure = "The answer is empty.";
    this.render();
    this.page.changed(this);
  }

  // What came before the failure stays, with the failure under it.
  fail(error, answer = null) {
    const words = error instanceof ApiError ? error.message : `This page failed: ${error.message}`;
    if (answer && (answer.content || answer.reasoning || answer.toolCalls)) answer.failure = words;
    else this.failure = words;
    this.page.failed(error);
  }

  stop() {
    this.running?.abort();
  }

  // At most a fifth of the time goes into showing.
  refreshSoon() {
    this.timer ??= setTimeout(
      () => {
        this.timer = null;
        if (!this.running) return;
        const begun = performance.now();
        this.view.refresh();
        this.cost = performance.now() - begun;
      },
      Math.max(16, 4 * (this.cost ?? 0)),
    );
  }

  isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < 60;
  }

  scrollDown() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  // Messages are built anew; the keyboard's place among them is kept.
  focusedControl() {
    const control = this.log.contains(document.activeElement) ? document.activeElement : null;
    const message = control?.closest(".message");
    if (!message) return null;
    return {
      place: [...this.log.children].indexOf(message),
      label: control.getAttribute("aria-label") ?? control.textContent,
    };
  }

  refocus(focused) {
    if (!focused) return;
    const controls = [...(this.log.children[focused.place]?.querySelectorAll("button") ?? [])].filter(
      (each) => !each.disabled,
    );
    const same = controls.find((each) => (each.getAttribute("aria-label") ?? each.textContent) === focused.label);
    (same ?? controls[0])?.focus({ preventScroll: true });
  }
}
