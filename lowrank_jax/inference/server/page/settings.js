"use strict";
// Settings: of each chat in its record, of the page in localStorage; the key lasts as long as the browser's session.

const PREFERENCES = "lowrank.settings";
const CHAT_DEFAULTS = { system: "", preset: "balanced", temperature: null, top_p: null, max_tokens: 512 };
const preferences = loadPreferences();

function loadPreferences() {
  const { key, theme, record, ...rest } = inLocalStorage(PREFERENCES) ?? {};
  if (key) sessionStorage.setItem("lowrank.key", key); // earlier versions kept it in localStorage
  const own = Object.fromEntries(
    Object.keys(CHAT_DEFAULTS)
      .filter(name => name in (rest.chat ?? rest))
      .map(name => [name, (rest.chat ?? rest)[name]]),
  );
  return { theme: theme ?? "auto", record: record ?? true, chat: { ...CHAT_DEFAULTS, ...own } };
}

// Returns a chat's own settings, and those of new chats for what it leaves open.
const settingsOf = which => ({ ...preferences.chat, ...which.settings });

function keepPreferences() {
  try {
    localStorage.setItem(PREFERENCES, JSON.stringify(preferences));
  } catch {}
  paint();
}

function paint() {
  if (preferences.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = preferences.theme;
}

function openChatSettings() {
  const form = $("chat-settings").querySelector("form"),
    values = settingsOf(chat);
  form.preset.replaceChildren(
    ...Object.keys(model?.presets ?? { [values.preset]: 0 }).map(name => new Option(name, name)),
  );
  for (const name of Object.keys(CHAT_DEFAULTS)) form[name].value = values[name] ?? "";
  if (model) form.max_tokens.max = model.max_tokens;
  form.max_tokens.value = Math.min(form.max_tokens.value, model?.max_tokens ?? Infinity);
  usePreset(false);
  form.defaults.checked = false;
  open("chat-settings");
}

// Fills in the preset's values, where there are none or always.
function usePreset(always) {
  const form = $("chat-settings").querySelector("form"),
    values = model?.presets[form.preset.value];
  for (const name of ["temperature", "top_p"])
    if (values && (always || form[name].value === "")) form[name].value = values[name];
}

async function takeChatSettings() {
  const form = $("chat-settings").querySelector("form"),
    settings = {};
  for (const name of Object.keys(CHAT_DEFAULTS)) {
    const text = form[name].value;
    settings[name] = form[name].type === "number" ? (text === "" ? CHAT_DEFAULTS[name] : Number(text)) : text;
  }
  chat.settings = settings;
  if (form.defaults.checked) {
    preferences.chat = { ...settings };
    keepPreferences();
  }
  if (chat.time) await write(chat, { settings }, []);
  drawMeter();
}

function openSettings() {
  const form = $("settings").querySelector("form");
  form.theme.value = preferences.theme;
  form.record.checked = preferences.record;
  form.key.value = sessionStorage.getItem("lowrank.key") ?? "";
  open("settings");
}

function takeSettings() {
  const form = $("settings").querySelector("form");
  preferences.theme = form.theme.value;
  preferences.record = form.record.checked;
  keepPreferences();
  takeKey(form.key.value);
}

function askForKey() {
  if ($("key").open) return;
  $("key").querySelector("input").value = "";
  open("key");
}

function takeKey(value) {
  if (value === (sessionStorage.getItem("lowrank.key") ?? "")) return;
  sessionStorage.setItem("lowrank.key", value);
  meet();
}

function open(id) {
  drawer(false);
  $(id).returnValue = "";
  $(id).showModal();
}

// Calls `take` when the dialog is closed by its button, not by Escape or Cancel.
function onSaved(id, take) {
  $(id).addEventListener("close", () => {
    if ($(id).returnValue === "save") take();
  });
  for (const cancel of $(id).querySelectorAll(".cancel")) cancel.addEventListener("click", () => $(id).close());
}
