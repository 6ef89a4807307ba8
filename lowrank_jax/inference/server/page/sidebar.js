"use strict";
// The list of chats: search, rename, export, import, delete.

const DAY = 24 * 3600 * 1000,
  ROWS = 100; // 1,000 rows take half a second to draw
let rows = ROWS; // chats that are listed
let listing = 0; // the number of the newest listing: searches overtake each other
const texts = new Map(); // id of a chat -> the texts of its shown messages, until one of them changes

async function drawChats() {
  const mine = ++listing,
    query = $("search").value.trim().toLowerCase();
  let chats = await allChats(),
    hits = new Map();
  if (query) {
    hits = await searched(chats, query, () => mine !== listing);
    chats = chats.filter(c => hits.has(c.id));
  }
  if (mine !== listing || $("chats").querySelector("input")) return; // overtaken, or a chat is being renamed
  const focused = document.activeElement.closest?.("#chats [data-chat]")?.dataset.chat;
  const act = document.activeElement.dataset.act;
  let group = "";
  $("chats").replaceChildren(
    ...chats.slice(0, rows).flatMap(c => {
      const heading = query ? "" : groupOf(c.time),
        isNew = heading !== group;
      group = heading;
      return [...(isNew && heading ? [make("h2", "", heading)] : []), chatRow(c, hits.get(c.id))];
    }),
  );
  if (chats.length > rows) $("chats").append(textButton(`${number(chats.length - rows)} more`, listMore, "more"));
  if (!chats.length) $("chats").append(make("p", "soft", query ? "No chat has these words." : "No chats yet."));
  if (focused)
    $("chats")
      .querySelector(`[data-chat="${CSS.escape(focused)}"] [data-act=${act}]`)
      ?.focus();
}

async function listMore() {
  const first = rows;
  rows += 10 * ROWS;
  await drawChats();
  $("chats").querySelectorAll("[data-act=open]")[first]?.focus();
}

function groupOf(time) {
  const days = (new Date().setHours(24, 0, 0, 0) - time) / DAY;
  return days < 1 ? "Today" : days < 2 ? "Yesterday" : days < 8 ? "Last 7 days" : "Earlier";
}

// Returns {id of a chat: the text around the first hit}. Reads each chat once: 1,000 of them take seconds.
async function searched(chats, query, isOvertaken) {
  const hits = new Map();
  for (const c of chats) {
    if (!texts.has(c.id)) {
      const read = thread(c, await messagesOf(c.id)).map(({ message }) => message.content);
      texts.set(c.id, read);
      if (isOvertaken()) break;
    }
    for (const text of [c.title, ...texts.get(c.id)]) {
      const at = text.toLowerCase().indexOf(query);
      if (at < 0) continue;
      hits.set(c.id, text === c.title ? "" : text.slice(Math.max(0, at - 20), at + 60));
      break;
    }
  }
  return hits;
}

function chatRow(c, snippet = "") {
  const row = make("div", "chat"),
    title = c.title || "Empty chat";
  row.dataset.chat = c.id;
  const open = textButton(make("span", "name", title), () => {
    drawer(false);
    showChat(c);
  });
  if (snippet) open.append(make("span", "snippet", snippet));
  open.title = title;
  open.dataset.act = "open";
  if (c.id === chat.id) open.setAttribute("aria-current", "true");
  if ([...writing.values()].some(({ reply }) => reply.chat === c.id)) row.classList.add("busy");
  const more = iconButton("more", `More about ${title.slice(0, 40)}`, () => openMenu(c, more));
  row.append(open, more);
  return row;
}

function openMenu(c, opener) {
  const menu = $("menu"),
    item = (name, text, act) => {
      const entry = textButton(icon(name), () => {
        menu.hidePopover();
        act();
      });
      entry.append(text);
      return entry;
    };
  menu.replaceChildren(
    item("edit", "Rename", () => rename(c)),
    item("export", "Export", () => exportChats(c.id)),
    item("delete", "Delete", () => deleteChat(c)),
  );
  menu.showPopover();
  const box = opener.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(box.left, innerWidth - menu.offsetWidth - 8))}px`;
  menu.style.top = `${Math.max(8, Math.min(box.bottom + 4, innerHeight - menu.offsetHeight - 8))}px`;
  menu.firstElementChild.focus();
}

function rename(c) {
  const row = $("chats").querySelector(`[data-chat="${CSS.escape(c.id)}"]`),
    field = make("input");
  field.value = c.title;
  field.setAttribute("aria-label", "New name of the chat");
  let isDone = false;
  const end = async save => {
    if (isDone) return;
    isDone = true;
    field.remove();
    const title = field.value.trim();
    if (save && title && title !== c.title) {
      await write(c, { title }, []);
      if (c.id === chat.id) {
        chat.title = title;
        draw();
      }
    }
    await drawChats();
    $("chats")
      .querySelector(`[data-chat="${CSS.escape(c.id)}"] button`)
      ?.focus();
  };
  field.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.stopPropagation();
    end(event.key === "Enter");
  });
  field.addEventListener("blur", () => end(true));
  row.replaceChildren(field);
  field.select();
}

async function deleteChat(c) {
  stopAll(c.id);
  const { chats } = await exported(c.id);
  await removeChat(c.id);
  if (c.id === chat.id) await showChat(null);
  else await drawChats();
  $("input").focus();
  toast("Chat deleted", "Undo", async () => {
    await insert(chats);
    await drawChats();
  });
}

async function exportChats(only = null) {
  const file = await exported(only),
    day = new Date().toISOString().slice(0, 10);
  const name = only ? file.chats[0].title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "chat" : "chats";
  download(`${name}-${day}.json`, JSON.stringify(file, null, 1));
}

async function importChats(files) {
  try {
    for (const file of files) {
      const chats = chatsIn(await file.text());
      await insert(chats);
      toast(chats.length === 1 ? "1 chat imported" : `${chats.length} chats imported`);
      if (chats.some(c => c.id === chat.id)) await showChat(await storedChat(chat.id));
    }
  } catch (e) {
    complain(e.message);
  }
  await drawChats();
}
