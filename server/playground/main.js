// The page's controls: what a person does, and what happens then.

import { asCurl, headers, makeRequest } from "./request.js";
import { chunks, get } from "./stream.js";
import { Choice, Clock, element, explainTokens } from "./view.js";

const $ = (id) => document.getElementById(id);
const form = $("ask");
let history = [];
let running = null;

const mode = () => form.elements.mode.value;

function report(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

async function listModels() {
  try {
    const { data } = await (await get("v1/models", headers())).json();
    const chosen = $("model").value;
    $("model").replaceChildren(
      ...data.map(({ id, status }) => {
        const option = element("option", "", status === "loaded" ? id : `${id} (${status})`);
        option.value = id;
        return option;
      }),
    );
    if (data.some(({ id }) => id === chosen)) $("model").value = chosen;
    report("");
  } catch (error) {
    report(error.message);
  }
}

/** Follow a link as the holder of the key; the browser alone would leave it out. */
async function follow(event) {
  if (!headers().authorization) return;
  event.preventDefault();
  try {
    const response = await get(event.currentTarget.href, headers());
    const text = new Blob([await response.text()], { type: "text/plain;charset=utf-8" });
    location.assign(URL.createObjectURL(text));
  } catch (error) {
    report(error.message);
  }
}

function setMode() {
  form.dataset.mode = mode();
  $("prompt-name").textContent = mode() === "chat" ? "Your message" : "Prompt";
  clear();
}

function clear() {
  running?.abort();
  setRunning(null);
  history = [];
  $("history").replaceChildren();
  $("choices").replaceChildren();
  $("status").textContent = $("token").textContent = "";
  $("token").hidden = $("scale").hidden = true;
  report("");
}

function showMessage({ role, content }) {
  const article = element("article", role);
  article.append(element("h3", "", role), element("div", "text", content));
  $("history").append(article);
}

function setRunning(controller) {
  running = controller;
  $("send").disabled = Boolean(controller);
  $("stop").disabled = !controller;
  $("choices").setAttribute("aria-busy", Boolean(controller));
}

/** Fill `choices` from the stream, and tell `clock` the tokens that the server counted. */
async function receive(request, choices, clock, signal) {
  for await (const chunk of chunks(request, headers(), signal)) {
    clock.tokens = chunk.usage?.completion_tokens ?? clock.tokens;
    for (const choice of chunk.choices) {
      if (choice.text || choice.delta?.content || choice.delta?.reasoning_content) clock.tick();
      choices[choice.index].add(choice);
    }
  }
}

async function send() {
  if (running) return;
  let request;
  try {
    request = makeRequest(mode(), history);
  } catch (error) {
    report(error.message);
    return;
  }
  report("");
  const question = mode() === "chat" ? { role: "user", content: $("prompt").value } : null;
  if (question) takeQuestion(question);
  const count = request.body.n ?? 1;
  const name = question ? "assistant" : "Answer";
  const choices = Array.from({ length: count }, (_, i) => new Choice(count > 1 ? `${name} ${i + 1}` : name));
  $("choices").replaceChildren(...choices.map((choice) => choice.root));
  $("token").hidden = $("scale").hidden = !request.body.logprobs;
  $("token").textContent = "";
  $("status").textContent = "Waiting for the first token…";
  const controller = new AbortController();
  setRunning(controller);
  const clock = new Clock();
  let failure = null;
  try {
    await receive(request, choices, clock, controller.signal);
  } catch (error) {
    failure = error;
  }
  // After `clear` nobody waits for this any more.
  if (running !== controller) return;
  setRunning(null);
  const stopped = controller.signal.aborted;
  const ending = failure ? (stopped ? "Stopped" : "Failed") : "Done";
  $("status").textContent = `${ending}: ${clock.summary(count)}.`;
  if (failure && !stopped) report(failure.message);
  if (question) keepAnswer(question, choices[0], failure && !stopped);
}

/** The message moves from its box into the chat. */
function takeQuestion(question) {
  showMessage(question);
  $("prompt").value = "";
}

/** A question stays in the chat if there is an answer to it, else it goes back to its box. */
function keepAnswer(question, answer, failed) {
  if (failed || !answer.text) {
    $("history").lastElementChild?.remove();
    $("prompt").value ||= question.content;
    return;
  }
  history.push(question, { role: "assistant", content: answer.text });
  $("history").append(answer.root);
}

/** Keep the shown command true to the form; what is wrong with the form stands in its place. */
function showCurl() {
  if (!$("curl").open) return;
  const place = $("curl").querySelector("pre");
  try {
    place.textContent = asCurl(makeRequest(mode(), history));
  } catch (error) {
    place.textContent = error.message;
  }
}

async function copyCurl() {
  try {
    const command = asCurl(makeRequest(mode(), history));
    $("curl").open = true;
    showCurl();
    await navigator.clipboard.writeText(command);
    $("status").textContent = "Copied.";
  } catch (error) {
    // Browsers give the clipboard to secure pages only; the command stands on the page as well.
    const denied = !navigator.clipboard || error.name === "NotAllowedError";
    if (denied) $("status").textContent = "The browser doesn't let the page copy; the command is below.";
    else report(error.message);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("copy").addEventListener("click", copyCurl);
$("curl").addEventListener("toggle", showCurl);
document.addEventListener("input", showCurl);
$("key").addEventListener("change", listModels);
$("metrics").addEventListener("click", follow);
form.elements.mode.forEach((option) => option.addEventListener("change", setMode));
explainTokens($("answer"), $("token"));
setMode();
listModels();
