// Talking to the API: JSON answers, and streams of server-sent events.

/** What the API says went wrong. */
async function failure(response) {
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`The server answered ${response.status}.`);
  }
}

/** The answer to a GET. */
export async function get(path, headers) {
  const response = await fetch(path, { headers });
  if (!response.ok) throw await failure(response);
  return response;
}

/** The chunks of a streamed answer, each as an object. Throws the error that ends a stream too early. */
export async function* chunks({ path, body }, headers, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await failure(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("The stream broke off.");
}

/** The data of each event: the server writes one `data:` line an event, and a blank line after it. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (buffer + value).split("\n\n");
      buffer = parts.pop();
      for (const part of parts) yield part.slice("data: ".length);
    }
  } finally {
    await reader.cancel();
  }
}
