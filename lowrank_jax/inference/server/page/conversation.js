"use strict";
// The chat that is shown, and what one does with it: send, answer, retry, continue, edit, delete, choose a version.

const SAVE_EVERY = 300,
  LIVE = 2500; // ms: between saves of a growing answer; after another tab's last word on one
const BUSY = "An answer is being written: wait for its end, or stop it";
const FIRST_GUESS = 0.5; // tokens per letter, until an answer tells

const writing = new Map(); // id -> {reply, control}: the answers that this tab writes, in any chat
const heard = new Map(); // id -> when another tab last wrote it
let chat = null; // its time is 0 until it is stored
let messages = new Map();

const shownThread = () => thread(chat, [...messages.values()]);
const isLive = m => writing.has(m.id) || (m.state === "writing" && Date.now() - (heard.get(m.id) ?? 0) < LIVE);
const current = () =>
  shownThread()
    .map(({ message }) => message)
    .find(m => writing.has(m.id));

function freshChat() {
  return { id: newId(), title: "", time: 0, settings: { ...preferences.chat }, shown: {} };
}

function newMessage(role, content, after, slot = null) {
  const id = newId(),
    time = Math.max(Date.now(), ...[...messages.values()].map(m => m.time + 1));
  return { id, chat: chat.id, slot: slot ?? id, after, time, role, content, state: "done" };
}

// Keeps new or changed messages of a chat, and shows them.
async function keep(which, records, fields = {}, isNew = false) {
  const versions = records.filter(record => record.slot !== record.id || which.shown[record.slot]);
  const shown = Object.fromEntries(versions.map(record => [record.slot, record.id]));
  for (const copy of which.id === chat.id ? [which, chat] : [which])
    Object.assign(copy, fields, { shown: { ...copy.shown, ...shown } });
  if (which.id === chat.id) {
    for (const record of records) messages.set(record.id, record);
    draw();
  }
  try {
    await write(which, { ...fields, shown }, records, isNew);
    if (Object.keys(fields).length) await drawChats();
  } catch (e) {
    complain(`This chat cannot be saved (${e.message || e.name}). Copy what you need, and reload the page.`);
  }
}

async function send(text) {
  const isNew = !chat.time,
    question = newMessage("user", text, shownThread().at(-1)?.message.id ?? "");
  if (isNew) history.pushState(null, "", "#" + chat.id);
  follow(true);
  await keep(chat, [question], { time: Date.now(), ...(isNew && { title: titleOf(text) }) }, isNew);
  await answer(question);
}

// Asks for an answer to a question, or for another version in the place of one.
async function answer(question, slot = null) {
  const reply = newMessage("assistant", "", question.id, slot);
  await begin(reply);
}

// Goes on with an answer that was stopped, cut off or interrupted.
const resume = reply => begin(reply);

// Begins a new version of an answer with these tokens, and goes on from there.
async function branch(reply, tokens, content) {
  const other = newMessage("assistant", content, reply.after, reply.slot);
  if (tokens) other.tokens = tokens;
  await begin(other);
}

async function begin(reply) {
  if (current()) return toast(BUSY);
  Object.assign(reply, { state: "writing", finish: "", error: null });
  const which = chat,
    control = new AbortController();
  writing.set(reply.id, { reply, control });
  await keep(which, [reply], { time: Date.now() });
  const path = shownThread().map(({ message }) => message);
  const before = path.slice(
    0,
    path.findIndex(m => m.id === reply.id),
  );
  const beat = setInterval(() => announce(which.id, [reply]), 1000);
  try {
    await answerFrom(which, before, reply, control.signal);
    reply.state = "done";
  } catch (e) {
    if (control.signal.aborted) reply.state = "stopped";
    else fail(reply, e);
  }
  clearInterval(beat);
  writing.delete(reply.id);
  await keep(which, [reply], { time: Date.now() });
  if (which.id === chat.id) say(reply.content.slice(0, 2000) || "No answer");
}

function fail(reply, e) {
  reply.state = "failed";
  reply.error = { text: e.message, status: e.status ?? 0, code: e.code ?? "" };
  if (e.status === 401) askForKey();
  if (!(e instanceof Refusal)) console.error(e);
}

// Streams an answer into the reply. What the server finds too long it gets without the oldest turns.
async function answerFrom(which, before, reply, signal) {
  if (!model) await greet();
  const continues = Boolean(reply.content),
    own = continues ? [{ ...reply }] : [];
  const records = preferences.record && (!continues || Boolean(reply.tokens)); // never of a part alone
  if (!records) delete reply.tokens;
  const settings = settingsOf(which);
  let turns = fitting(turnsOf([...before, ...own]), settings, tokensPerLetter(before));
  for (let isRenewed = false; ;) {
    reply.from = turns[0].id;
    try {
      const body = requestFor(turns, settings, continues, records);
      return await receive(reply, body, lettersIn(turns), signal);
    } catch (e) {
      if (e.code === "model_not_found" && !isRenewed) {
        // the server was restarted with another model
        isRenewed = true;
        await greet();
        continue;
      }
      const shorter = e.code === "context_length_exceeded" ? withoutOldest(turns) : null;
      if (!shorter) throw e.code === "context_length_exceeded" ? tooLong(continues, e) : e;
      turns = shorter;
    }
  }
}

function tooLong(continues, e) {
  const limit = `the model's context of ${number(model.context)} tokens`;
  const message = continues
    ? `The question and this answer fill ${limit}.`
    : `This message (with the system prompt) is longer than ${limit}. Edit it to make it shorter.`;
  return new Refusal(message, e.status, e.code);
}

async function receive(reply, body, letters, signal) {
  const began = performance.now(),
    response = await call("/v1/chat/completions", body, signal);
  const stats = (reply.stats ??= { tokens: 0, seconds: 0, first: 0 });
  const before = { ...stats };
  let saved = began,
    cost = 0,
    count = 0,
    firstAt = 0;
  for await (const event of events(response)) {
    const choice = event.choices[0],
      now = performance.now();
    if (event.usage) {
      const { prompt_tokens: prompt, completion_tokens: completion } = event.usage;
      reply.usage = { prompt, completion, letters };
      count = completion;
    }
    if (choice?.delta.content) reply.content += choice.delta.content;
    if (choice?.logprobs?.content.length) {
      (reply.tokens ??= []).push(...choice.logprobs.content.map(tokenOf));
      count += choice.logprobs.content.length;
    }
    if (choice?.finish_reason) reply.finish = choice.finish_reason;
    if (choice?.delta.content) {
      firstAt ||= now;
      stats.first = (firstAt - began) / 1000;
    }
    if (choice) stats.seconds = before.seconds + (now - began) / 1000;
    stats.tokens = before.tokens + count;
    grow(reply);
    if (now - saved > SAVE_EVERY + 20 * cost) {
      await keepSilently(reply);
      saved = performance.now();
      cost = saved - now;
    }
  }
  if (reply.finish === "length" && reply.usage.prompt + reply.usage.completion >= model.context)
    reply.finish = "context";
}

// Saves a growing answer; a failure shows at the end, when the whole is kept.
async function keepSilently(reply) {
  try {
    await write({ id: reply.chat }, {}, [reply]);
  } catch {}
}

const tokenOf = ({ token, logprob, bytes, top_logprobs }) => ({
  text: token,
  logprob,
  top: top_logprobs.map(other => [other.token, other.logprob]),
  ...(token.includes("\ufffd") && { bytes }),
});

function tokensPerLetter(before) {
  const usage = before.findLast(m => m.usage?.letters)?.usage;
  return usage ? usage.prompt / usage.letters : FIRST_GUESS;
}

// Returns how many tokens of the context the chat takes, with the text that is being typed.
function tokensUsed(draft = "") {
  const path = shownThread().map(({ message }) => message),
    at = path.findLastIndex(m => m.usage);
  const perLetter = tokensPerLetter(path),
    rest = turnsOf([...path.slice(at + 1), ...(draft ? [{ role: "user", content: draft }] : [])]);
  const known = at >= 0 ? path[at].usage.prompt + path[at].usage.completion : 0;
  return Math.round(known + estimate(rest, perLetter));
}

function stop() {
  const reply = current();
  writing.get(reply?.id)?.control.abort();
}

function stopAll(id) {
  for (const { reply, control } of writing.values()) if (reply.chat === id) control.abort();
}

async function edit(message, text) {
  if (message.role === "assistant")
    return keep(chat, [Object.assign(newMessage("assistant", text, message.after, message.slot))]);
  const changed = newMessage("user", text, message.after, message.slot);
  await keep(chat, [changed], { time: Date.now() });
  await answer(changed);
}

async function remove(message) {
  writing.get(message.id)?.control.abort();
  await keep(chat, [Object.assign(message, { deleted: true })]);
  const which = chat;
  toast("Message deleted", "Undo", () => keep(which, [Object.assign(message, { deleted: false })]));
}

async function chooseVersion(version) {
  chat.shown[version.slot] = version.id;
  draw();
  await write(chat, { shown: { [version.slot]: version.id } }, []);
}

async function showChat(which) {
  chat = which ?? freshChat();
  const stored = which ? await messagesOf(which.id) : [];
  messages = new Map(stored.map(m => [m.id, writing.get(m.id)?.reply ?? m]));
  const address = which ? "#" + which.id : location.pathname;
  if (location.hash !== (which ? address : "")) history.pushState(null, "", address);
  follow(true);
  takeDraft();
  draw();
  await drawChats();
}

// Takes over what another tab wrote.
async function listen({ data }) {
  if (!database) return;
  texts.delete(data.chat);
  const stored = await storedChat(data.chat);
  if (!stored) stopAll(data.chat);
  for (const m of data.chat === chat.id ? data.messages : []) {
    if (writing.has(m.id)) continue;
    const whole = m.state === "writing" ? null : await storedMessage(m.id);
    messages.set(m.id, whole ?? { ...m, tokens: messages.get(m.id)?.tokens });
    if (m.state === "writing") heard.set(m.id, Date.now());
    setTimeout(draw, LIVE + 100);
  }
  if (data.chat === chat.id && chat.time) {
    if (!stored) {
      toast("This chat was deleted in another tab");
      return showChat(null);
    }
    Object.assign(chat, stored);
    if (!data.messages.length) for (const m of await messagesOf(chat.id)) if (!writing.has(m.id)) messages.set(m.id, m);
    draw();
  }
  if (!data.messages.some(m => m.state === "writing")) await drawChats();
}
