"use strict";
// Chats in IndexedDB. A chat and each of its messages are records of their own, so that tabs that write to one chat add
// to it and never overwrite each other. A message names the one that it follows (`after`) and its place (`slot`): an
// edit or another answer is a further version in the same place.
//
//   chat     {id, title, time, settings, shown: {slot: id of the version that is shown}}
//   message  {id, chat, slot, after, time, role, content, state, saved, and for answers: finish, error, from, usage,
//             stats, tokens}; the state is done, writing, stopped or failed

const DATABASE = "lowrank",
  VERSION = 1,
  FORMAT = "lowrank-chats",
  OLD_CHAT = "lowrank.chat.";
const UNSAVED = "lowrank.unsaved.";
const tabs = new BroadcastChannel("lowrank");
let database = null;

async function openDatabase() {
  database = await idb.openDB(DATABASE, VERSION, {
    upgrade(db) {
      // from version 0; later versions add their steps
      db.createObjectStore("chats", { keyPath: "id" });
      db.createObjectStore("messages", { keyPath: "id" }).createIndex("chat", "chat");
    },
    blocking() {
      database.close();
      complain("A newer version of this page is open. Reload this one.");
    },
    terminated() {
      complain("The browser closed the page's storage. Reload the page.");
    },
  });
  await takeOver();
  await takeUnsaved();
}

function inLocalStorage(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

// Keeps a growing answer of a page that ends: a transaction might not come to its end, localStorage does.
function leaveBehind(record) {
  try {
    localStorage.setItem(UNSAVED + record.id, JSON.stringify({ ...record, saved: Date.now() }));
  } catch {} // it is full: what was saved last remains
}

async function takeUnsaved() {
  for (const key of Object.keys(localStorage).filter(key => key.startsWith(UNSAVED))) {
    const record = inLocalStorage(key);
    if (typeof record?.id !== "string") continue; // not ours to delete
    const stored = await storedMessage(record.id);
    if (stored?.saved < record.saved) await write({ id: record.chat }, {}, [record]);
    localStorage.removeItem(key);
  }
}

// Moves the chats of earlier versions, which were in localStorage.
async function takeOver() {
  for (const key of Object.keys(localStorage).filter(key => key.startsWith(OLD_CHAT))) {
    try {
      await insert([checkedChat({ ...inLocalStorage(key), id: key.slice(OLD_CHAT.length) })]);
      localStorage.removeItem(key);
    } catch {} // not ours to delete
  }
}

async function allChats() {
  const chats = database ? await database.getAll("chats") : [];
  return chats.sort((a, b) => b.time - a.time);
}

const storedChat = id => database?.get("chats", id);
const storedMessage = id => database?.get("messages", id);
const messagesOf = id => (database ? database.getAllFromIndex("messages", "chat", id) : []);

// Writes messages and changes fields of their chat, at once; does nothing if the chat was deleted meanwhile.
async function write(chat, fields, records, isNew = false) {
  for (const record of records) record.saved = Date.now();
  if (!database) return;
  const transaction = database.transaction(["chats", "messages"], "readwrite");
  const stored = (await transaction.objectStore("chats").get(chat.id)) ?? (isNew ? chat : null);
  if (stored) {
    const shown = { ...stored.shown, ...fields.shown };
    for (const record of records) transaction.objectStore("messages").put(record);
    transaction.objectStore("chats").put({ ...stored, ...fields, shown });
  }
  await transaction.done;
  announce(chat.id, records);
}

// Tells the other tabs. Probabilities are left out, as they are large: the database has them.
function announce(chat, records = []) {
  texts.delete(chat);
  tabs.postMessage({ chat, messages: records.map(({ tokens, ...rest }) => rest) });
}

async function removeChat(id) {
  const transaction = database.transaction(["chats", "messages"], "readwrite");
  const messages = transaction.objectStore("messages");
  for (const key of await messages.index("chat").getAllKeys(id)) messages.delete(key);
  transaction.objectStore("chats").delete(id);
  await transaction.done;
  announce(id);
}

// Returns chats with their messages, all or one.
async function exported(only = null) {
  const chats = (await allChats()).filter(chat => !only || chat.id === only);
  const full = await Promise.all(chats.map(async chat => ({ ...chat, messages: await messagesOf(chat.id) })));
  return { format: FORMAT, version: VERSION, chats: full };
}

// Adds chats: what is stored already stays, unless the new version of a message was saved later.
async function insert(chats) {
  const transaction = database.transaction(["chats", "messages"], "readwrite");
  const [headers, bodies] = ["chats", "messages"].map(name => transaction.objectStore(name));
  for (const whole of chats) {
    let { messages, ...chat } = whole;
    const others = await Promise.all(messages.map(m => bodies.get(m.id)));
    if (others.some(m => m && m.chat !== chat.id)) ({ messages, ...chat } = withOwnIds(whole));
    if (!(await headers.get(chat.id))) headers.put(chat);
    for (const message of messages) {
      const stored = await bodies.get(message.id);
      if (!stored || stored.saved < message.saved) bodies.put(message);
    }
  }
  await transaction.done;
  for (const chat of chats) announce(chat.id);
}

// Returns a chat whose messages have ids that no other chat's have.
function withOwnIds(chat) {
  const own = id => id && `${chat.id}.${id}`;
  const shown = Object.fromEntries(Object.entries(chat.shown).map(([slot, id]) => [own(slot), own(id)]));
  const messages = chat.messages.map(m => ({
    ...m,
    id: own(m.id),
    slot: own(m.slot),
    after: own(m.after),
    from: own(m.from),
  }));
  return { ...chat, shown, messages };
}

// Returns the chats of a file: an export, or conversations in OpenAI's form, as JSON or JSON lines. Throws for others.
function chatsIn(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    try {
      value = text
        .split("\n")
        .filter(line => line.trim())
        .map(line => JSON.parse(line));
    } catch {
      throw new Error("This file is not JSON.");
    }
  }
  if (value?.format === FORMAT && value.version > VERSION)
    throw new Error("A newer version of this page wrote the file.");
  const list = Array.isArray(value) ? value : Array.isArray(value?.chats) ? value.chats : [value];
  if (!list.length) throw new Error("This file has no chats.");
  return list.map((chat, i) => {
    try {
      return checkedChat(chat);
    } catch (e) {
      throw new Error(`Chat ${i + 1} of the file: ${e.message}`);
    }
  });
}

// Returns a chat with known fields of the right types; throws if it has no messages.
function checkedChat(value) {
  if (!Array.isArray(value?.messages)) throw new Error("it has no list of messages.");
  const text = (x, otherwise) => (typeof x === "string" ? x : otherwise);
  const time = (x, otherwise) => (Number.isFinite(x) ? x : otherwise);
  const object = x => (x && typeof x === "object" && !Array.isArray(x) ? x : null);
  const has = (x, names) => names.every(name => Number.isFinite(object(x)?.[name]));
  const chat = {
    id: text(value.id, "") || newId(),
    time: time(value.time, Date.now()),
    shown: object(value.shown) ?? {},
  };
  const isSetting = ([name, x]) =>
    ["system", "preset"].includes(name)
      ? typeof x === "string"
      : ["temperature", "top_p", "max_tokens"].includes(name) && Number.isFinite(x);
  chat.settings = Object.fromEntries(Object.entries(object(value.settings) ?? {}).filter(isSetting));
  const ids = new Set([""]);
  let after = "";
  chat.messages = value.messages
    .filter(m => m?.role !== "system" && m?.role !== "developer")
    .map((m, i) => {
      if (!["user", "assistant"].includes(m?.role) || typeof m.content !== "string") {
        throw new Error(`message ${i + 1} must have a role (user or assistant) and a text as content.`);
      }
      const id = ids.has(text(m.id, "")) ? `${chat.id}.${i}` : m.id,
        { role, content } = m;
      ids.add(id);
      const message = { id, chat: chat.id, slot: text(m.slot, id), after: text(m.after, after), role, content };
      message.time = time(m.time, chat.time + i);
      message.saved = time(m.saved, 0);
      message.state = ["stopped", "failed"].includes(m.state) ? m.state : m.state === "writing" ? "stopped" : "done";
      message.deleted = m.deleted === true;
      if (has(m.usage, ["prompt", "completion"])) message.usage = m.usage;
      if (has(m.stats, ["tokens", "seconds", "first"])) message.stats = m.stats;
      if (typeof m.error?.text === "string") message.error = m.error;
      for (const name of ["finish", "from"]) if (text(m[name], "")) message[name] = m[name];
      if (Array.isArray(m.tokens) && m.tokens.every(isToken)) message.tokens = m.tokens;
      after = id;
      return message;
    });
  const system = value.messages.find(m => m?.role === "system" || m?.role === "developer");
  if (system) chat.settings.system = text(system.content, "");
  chat.title = text(value.title, titleOf(chat.messages.find(m => m.role === "user")?.content ?? "Empty chat"));
  return chat;
}

const isToken = t =>
  typeof t?.text === "string" &&
  Number.isFinite(t.logprob) &&
  Array.isArray(t.top) &&
  t.top.every(other => Array.isArray(other) && typeof other[0] === "string" && Number.isFinite(other[1])) &&
  (t.bytes === undefined || (Array.isArray(t.bytes) && t.bytes.every(Number.isInteger)));
const titleOf = text => text.trim().replace(/\s+/g, " ").slice(0, 80);

// Returns the shown messages in order, each with the versions in its place. What two tabs said after the same message
// follows one after the other, each with its answers.
function thread(chat, messages) {
  const ids = new Set(messages.map(m => m.id)),
    following = new Map(),
    shown = [];
  for (const m of [...messages].sort((a, b) => a.time - b.time || (a.id < b.id ? -1 : 1))) {
    const after = ids.has(m.after) ? m.after : "";
    const slots = following.get(after) ?? following.set(after, new Map()).get(after);
    slots.set(m.slot, [...(slots.get(m.slot) ?? []), m]);
  }
  const waiting = [...(following.get("")?.values() ?? [])].reverse();
  while (waiting.length) {
    const all = waiting.pop(),
      versions = all.filter(m => !m.deleted);
    const message = versions.find(m => m.id === chat.shown[m.slot]) ?? versions.at(-1) ?? all.at(-1);
    if (versions.length) shown.push({ message, versions });
    waiting.push(...[...(following.get(message.id)?.values() ?? [])].reverse());
  }
  return shown;
}
