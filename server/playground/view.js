// The answer on the page. Text enters it as text nodes only.

const LIKELY = [0.05, 0.25, 0.5, 0.8];
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;
const shown = (text) => JSON.stringify(text);

export function element(kind, className = "", text = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  return made;
}

/** One answer among n: its text, plain or token by token. */
export class Choice {
  constructor(title) {
    this.text = "";
    this.root = element("article");
    this.title = element("h3", "", title);
    this.thought = element("div", "thought");
    this.body = element("div", "text");
    this.root.append(this.title, this.thought, this.body);
    this.decoder = new TextDecoder();
    this.pending = 0;
  }

  /** Add the news of one chunk, from either route. */
  add({ text, delta, logprobs, finish_reason: reason }) {
    const added = text ?? delta?.content ?? "";
    this.text += added;
    this.thought.append(delta?.reasoning_content ?? "");
    if (logprobs?.content?.length) for (const token of logprobs.content) this.addToken(token);
    else this.body.append(added);
    if (reason) this.title.append(`, ended by ${reason}`);
  }

  /** A token whose bytes end inside a character is shown with the one that completes it. */
  addToken({ token, bytes, logprob, top_logprobs: top }) {
    const text = bytes ? this.decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
    this.pending += logprob;
    if (!text) return;
    const span = element("span", `token p${LIKELY.filter((p) => Math.exp(this.pending) > p).length}`, text);
    const others = (top ?? []).map((other) => `${shown(other.token)} ${percent(other.logprob)}`);
    span.details = `${shown(text)} ${percent(this.pending)} (logprob ${this.pending.toFixed(3)})`;
    if (others.length) span.details += `; likeliest: ${others.join(", ")}`;
    // One stop of the Tab key for the whole text; arrow keys go on from there.
    span.tabIndex = this.body.querySelector(".token") ? -1 : 0;
    this.pending = 0;
    this.body.append(span);
  }
}

/** Show a token's alternatives in `line` when it is pointed at or stepped to inside `root`. */
export function explainTokens(root, line) {
  const explain = ({ target }) => {
    if (target.details) line.textContent = target.details;
  };
  root.addEventListener("pointerover", explain);
  root.addEventListener("focusin", explain);
  root.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const next = step && event.target.classList.contains("token") && event.target[step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

/** Seconds of one answer: to its first token, and from there to its last. */
export class Clock {
  constructor() {
    this.begun = performance.now();
    this.tokens = 0;
  }

  tick() {
    this.last = performance.now();
    this.first ??= this.last;
  }

  /** In words. The first token of each choice came with the first tick and isn't part of the speed. */
  summary(choices) {
    if (this.first === undefined) return "no token";
    const parts = [`${this.tokens} tokens`, `first after ${Math.round(this.first - this.begun)} ms`];
    const seconds = (this.last - this.first) / 1000;
    const later = this.tokens - choices;
    if (later > 0 && seconds > 0) parts.push(`${(later / seconds).toFixed(1)} tokens/s`);
    return parts.join(", ");
  }
}
