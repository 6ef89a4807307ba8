"use strict";
// The server's API: its model, streams of answers, and what of a conversation fits into the context.

let model = null; // the server's description of its model

class Refusal extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    Object.assign(this, { status, code });
  }
}

async function call(path, body = null, signal = null) {
  const headers = { "Content-Type": "application/json" },
    key = sessionStorage.getItem("lowrank.key");
  if (key) headers.Authorization = "Bearer " + key;
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (e) {
    throw e.name === "AbortError" ? e : new Refusal("The server cannot be reached.");
  }
  if (response.ok) return response;
  let error = { message: `The server answered ${response.status}.` };
  try {
    error = (await response.json()).error ?? error;
  } catch {}
  throw new Refusal(error.message, response.status, error.code);
}

async function describe() {
  model = (await (await call("/v1/models")).json()).data[0];
}

// Yields the events of a stream; throws if it ends too early.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const lost = e => {
    throw e.name === "AbortError" ? e : new Refusal("The connection was lost.");
  };
  let text = "";
  for (;;) {
    const part = await reader.read().catch(lost);
    if (part.done) throw new Refusal("The connection was lost.");
    const blocks = (text + part.value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter(line => line.startsWith("data:"));
      const data = lines.map(line => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(event.error.message, 0, event.error.code);
      yield event;
    }
  }
}

// Returns messages as turns of a request: with text, and joined where one role speaks twice, as templates want it.
function turnsOf(messages) {
  const turns = [];
  for (const { id, role, content } of messages.filter(m => m.content.trim())) {
    if (turns.at(-1)?.role === role) turns.at(-1).content += "\n\n" + content;
    else turns.push({ id, role, content });
  }
  while (turns[0]?.role === "assistant" && turns.length > 1) turns.shift();
  return turns;
}

// Tokens are counted by the server alone; the last answer tells how many letters they have.
const lettersIn = turns => turns.reduce((sum, turn) => sum + turn.content.length + 12, 0);
const estimate = (turns, perLetter) => lettersIn(turns) * perLetter;

// Returns the turns without the oldest question and its answer; null if only the last question is left.
function withoutOldest(turns) {
  const next = turns.findIndex((turn, i) => i > 0 && turn.role === "user");
  return next > 0 ? turns.slice(next) : null;
}

// Returns the newest turns that leave room for an answer.
function fitting(turns, settings, perLetter) {
  const system = settings.system ? estimate([{ content: settings.system }], perLetter) : 0;
  const room = model.context - Math.min(settings.max_tokens, model.context / 4) - system;
  let rest;
  while (estimate(turns, perLetter) > room && (rest = withoutOldest(turns))) turns = rest;
  return turns;
}

function requestFor(turns, settings, continues, withProbabilities) {
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  const messages = [...system, ...turns.map(({ role, content }) => ({ role, content }))];
  const { preset, temperature, top_p } = settings;
  const body = { model: model.id, messages, stream: true, stream_options: { include_usage: true }, preset };
  if (Number.isFinite(temperature)) body.temperature = temperature;
  if (Number.isFinite(top_p)) body.top_p = top_p;
  body.max_tokens = Math.min(settings.max_tokens, model.max_tokens);
  if (continues) body.continue_final_message = true;
  if (withProbabilities) Object.assign(body, { logprobs: true, top_logprobs: 6 });
  return body;
}
