"use strict";
// Wiring: the message box, keys, and the start.

const TOUCH = matchMedia("(pointer: coarse)"),
  NARROW = matchMedia("(max-width: 759px)");

// On a phone Enter makes a line break: there is no Shift+Enter.
const sendsWithEnter = event => !event.shiftKey && !event.isComposing && !TOUCH.matches;

// Asks the server for its model.
async function greet() {
  await describe();
  $("model").textContent = model.id;
  draw();
}

async function meet() {
  $("alert").replaceChildren();
  try {
    await greet();
  } catch (e) {
    if (e.status === 401) askForKey();
    else complain(e.message, "Try again", meet);
  }
}

function submit() {
  const text = $("input").value.trim();
  if (!text || current()) return;
  $("input").value = "";
  keepDraft();
  fitInput();
  if (!TOUCH.matches) $("input").focus();
  send(text);
}

const draftKey = () => "lowrank.draft." + (chat.time ? chat.id : "new");
const keepDraft = () => sessionStorage.setItem(draftKey(), $("input").value);

function takeDraft() {
  $("input").value = sessionStorage.getItem(draftKey()) ?? "";
  fitInput();
}

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

function drawer(opens) {
  const changes = document.body.classList.contains("drawn") !== opens;
  document.body.classList.toggle("drawn", opens);
  $("veil").hidden = !opens;
  document.querySelector("main").inert = opens;
  $("open-side").setAttribute("aria-expanded", opens);
  if (changes) (opens ? $("new") : $("open-side")).focus();
}

async function startChat() {
  drawer(false);
  await showChat(null);
  if (!TOUCH.matches) $("input").focus();
}

// Escape closes what is open, and only if nothing is open stops the answer.
function escape(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open], :popover-open")) return;
  if (document.body.classList.contains("drawn")) drawer(false);
  else if (editing) endEdit();
  else stop();
}

async function showAddressed() {
  const stored = location.hash.length > 1 ? await storedChat(location.hash.slice(1)) : null;
  if (stored?.id !== chat?.id || !stored) await showChat(stored ?? null);
}

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  submit();
});
$("input").addEventListener("input", () => {
  fitInput();
  keepDraft();
  drawMeter();
});
$("input").addEventListener("keydown", event => {
  if (event.key !== "Enter" || !(sendsWithEnter(event) || event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  submit();
});
$("stop").addEventListener("click", () => {
  stop();
  $("input").focus();
});
$("newest").addEventListener("click", () => {
  follow(true);
  keepUp();
  $("input").focus();
});
$("log").addEventListener("scroll", () => follow(isAtEnd()));
for (const id of ["new", "new-too"]) $(id).addEventListener("click", startChat);
$("open-side").addEventListener("click", () => drawer(true));
$("veil").addEventListener("click", () => drawer(false));
$("search").addEventListener("input", drawChats);
$("search").addEventListener("keydown", event => {
  if (event.key !== "Escape" || !$("search").value) return;
  event.stopPropagation();
  $("search").value = "";
  drawChats();
});
$("open-settings").addEventListener("click", openSettings);
$("open-chat-settings").addEventListener("click", openChatSettings);
$("chat-settings")
  .querySelector("form")
  .preset.addEventListener("change", () => usePreset(true));
onSaved("settings", takeSettings);
onSaved("chat-settings", takeChatSettings);
onSaved("key", () => takeKey($("key").querySelector("input").value));
$("export").addEventListener("click", () => exportChats());
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  await importChats([...$("file").files]);
  $("file").value = "";
});
addEventListener("keydown", escape);
addEventListener("popstate", showAddressed);
addEventListener("pagehide", () => {
  for (const { reply } of writing.values()) leaveBehind(reply);
});
addEventListener("online", () => {
  if (!model) meet();
});
tabs.addEventListener("message", listen);
NARROW.addEventListener("change", () => drawer(false));

(async function start() {
  keepPreferences();
  try {
    await openDatabase();
  } catch (e) {
    complain(
      e.name === "VersionError"
        ? "A newer version of this page keeps the chats. Reload the page."
        : `This browser does not let the page keep chats (${e.message || e.name}). Export what you need.`,
    );
  }
  const [newest] = await allChats();
  if (newest && !location.hash) history.replaceState(null, "", "#" + newest.id);
  await showAddressed();
  if (!TOUCH.matches) $("input").focus();
  await meet();
})();
