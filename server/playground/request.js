// What the form says, as a request to the API.

const field = (id) => document.getElementById(id);

/** The part of the form's value that a number field holds, or undefined. Throws where it isn't one. */
function number(id, whole) {
  const input = field(id);
  if (input.validity.badInput) throw new Error(`${id} is no number`);
  if (input.value === "") return undefined;
  const value = Number(input.value);
  if (whole && !Number.isSafeInteger(value)) throw new Error(`${id} must be a whole number below 2^53`);
  return value;
}

function schema() {
  const text = field("schema").value.trim();
  if (!text) return undefined;
  try {
    return { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(text) } };
  } catch (error) {
    throw new Error(`The JSON schema isn't JSON: ${error.message}`);
  }
}

/** {path, body} of the request. `history`: the messages of the chat so far. Throws what is wrong with the form. */
export function makeRequest(mode, history) {
  const stops = field("stop-strings").value.split("\n").filter((line) => line);
  const alternatives = number("logprobs", true);
  const body = {
    model: field("model").value,
    ...(mode === "chat" ? { messages: messages(history) } : { prompt: field("prompt").value }),
    suffix: (mode === "completion" && field("suffix").value) || undefined,
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens", true),
    seed: number("seed", true),
    n: number("n", true),
    stop: stops.length ? stops : undefined,
    logprobs: alternatives === undefined ? undefined : true,
    top_logprobs: alternatives || undefined,
    response_format: schema(),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  // Through JSON, which leaves out what is undefined.
  return {
    path: mode === "chat" ? "v1/chat/completions" : "v1/completions",
    body: JSON.parse(JSON.stringify(body)),
  };
}

function messages(history) {
  const system = field("system").value;
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...history,
    { role: "user", content: field("prompt").value },
  ];
}

/** The headers of a request; the key lives in its field and nowhere else. */
export function headers() {
  const key = field("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** A command for a POSIX shell. It names the variable of the key, not the key. */
export function asCurl({ path, body }) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const lines = [`curl -N ${quoted(new URL(path, document.baseURI).href)}`];
  if (headers().authorization) lines.push('-H "Authorization: Bearer $TOKENMILL_API_KEY"');
  lines.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}
