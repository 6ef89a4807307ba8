"use strict";
// The log: messages with their buttons. `draw` changes only what differs, so that nothing jumps or loses the focus.

const NEAR = 40; // pixels from the end at which the log follows a growing answer

const drawn = new Map(); // id -> {element, signature}
const looked = new Set(); // ids of the answers into which one looks
let editing = null; // the id of the message that is edited
let following = true;
let growing = null; // the requested frame of a growing answer
let pause = 0; // no new frame before this time: rendering must not take the whole processor

function draw() {
  const path = shownThread(),
    log = $("log"),
    nodes = [],
    answers = path.filter(({ message }) => message.from);
  const first = answers.at(-1)?.message.from;
  path.forEach(({ message, versions }, i) => {
    if (i && message.id === first) nodes.push(forgottenMark());
    nodes.push(elementOf(message, versions, i === path.length - 1));
  });
  if (!path.length) nodes.push(emptyView());
  for (const child of [...log.children]) if (!nodes.includes(child)) child.remove();
  nodes.forEach((node, i) => {
    if (log.children[i] !== node) log.insertBefore(node, log.children[i] ?? null);
  });
  for (const id of drawn.keys()) if (!messages.has(id)) drawn.delete(id);
  const busy = Boolean(current());
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  document.title = [chat.title, model?.id].filter(Boolean).join(" \u00b7 ") || "Chat";
  $("title").textContent = chat.title || "New chat";
  drawMeter();
  keepUp();
}

function forgottenMark() {
  const mark = document.querySelector(".forgotten") ?? make("div", "forgotten", make("span"));
  mark.firstElementChild.textContent = "The model no longer reads what is above: the context is full";
  return mark;
}

function emptyView() {
  const box = make("div", "empty", make("h2", "", model?.id ?? "Chat"), make("p", "", "Say something to begin."));
  if (model) {
    const times = model.dense_cache_bytes_per_token / model.cache_bytes_per_token;
    const cache =
      times > 1
        ? ` \u00b7 a cache ${times.toFixed(times < 10 && times % 1 ? 1 : 0)} times smaller than dense attention's`
        : "";
    box.append(make("p", "", `${number(model.context)} tokens of context${cache}`));
  }
  box.append(make("p", "", "Chats stay in this browser."));
  return box;
}

// Returns the message's element, brought up to date if anything about it has changed.
function elementOf(message, versions, isLast) {
  const live = isLive(message),
    isEdited = editing === message.id,
    inside = looked.has(message.id) && !live;
  const { content, state, finish, error, stats } = message;
  const signature = JSON.stringify([
    content,
    state,
    finish,
    error,
    stats,
    versions.map(v => v.id),
    isLast,
    live,
    isEdited,
    inside,
  ]);
  const old = drawn.get(message.id);
  if (old?.signature === signature) return old.element;
  const element = old?.element ?? make("article", "message " + message.role, make("div", "text"));
  const act = element.contains(document.activeElement) ? document.activeElement.dataset.act : null;
  element.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  element.setAttribute("aria-busy", live);
  element.classList.toggle("busy", live);
  const text = element.querySelector(".text");
  while (text.nextSibling) text.nextSibling.remove();
  text.hidden = isEdited || (inside && Boolean(message.tokens));
  showText(text, message);
  if (isEdited) element.append(editor(message));
  else
    element.append(
      ...(inside ? [insideView(message)] : []),
      ...stateView(message, live, isLast),
      buttons(message, versions, live),
    );
  if (act) element.querySelector(`[data-act="${act}"]`)?.focus({ preventScroll: true });
  drawn.set(message.id, { element, signature });
  return element;
}

function showText(element, message) {
  if (message.role === "assistant") showMarkdown(element, message.content);
  else element.textContent = message.content;
}

function insideView(message) {
  const box = make("section", "inside", ...statsView(message));
  box.setAttribute("aria-label", "A look inside the answer");
  if (message.tokens?.length) {
    box.prepend(
      ...tokenView(message, (at, text, logprob) => {
        const kept = message.tokens.slice(0, at),
          chosen = { ...message.tokens[at], text, logprob };
        delete chosen.bytes;
        branch(
          message,
          [...kept, chosen],
          unitsOf([...kept, chosen])
            .map(unit => unit.text)
            .join(""),
        );
      }),
    );
  } else {
    box.prepend(make("p", "soft", "No probabilities were recorded for this answer."));
  }
  return box;
}

// Returns what is wrong with a message, and the way on.
function stateView(message, live, isLast) {
  const notice = (text, className, ...controls) => [
    make("div", "state " + className, make("span", "", text), ...controls),
  ];
  if (live) return [];
  if (message.role === "user") {
    return isLast
      ? notice(
          "This message has no answer.",
          "",
          textButton("Ask again", () => answer(message)),
        )
      : [];
  }
  const retry = textButton("Retry", () => retryAnswer(message));
  const goOn = message.content ? textButton("Continue", () => resume(message)) : null;
  if (message.state === "failed") {
    const parts = notice(message.error?.text ?? "The answer failed.", "error", retry, goOn);
    parts[0].setAttribute("role", "alert");
    return parts;
  }
  if (message.state === "writing") return notice("This answer was interrupted.", "", goOn, retry);
  if (message.state === "stopped") return notice("Stopped.", "", goOn, message.content ? null : retry);
  if (message.finish === "length") return notice("Cut off at the limit of new tokens.", "", goOn);
  if (message.finish === "context") return notice("Cut off: the context is full.", "", goOn);
  return message.content ? [] : notice("The model said nothing.", "", retry);
}

// Asks again: an answer that failed before its first word is replaced, any other stays as a version.
function retryAnswer(message) {
  if (!message.content) return resume(message);
  return answer({ id: message.after }, message.slot);
}

function buttons(message, versions, live) {
  const box = make("div", "under");
  if (live) return box;
  const at = versions.indexOf(message),
    choose = step => () => chooseVersion(versions[at + step]);
  if (versions.length > 1) {
    const left = iconButton("left", "Previous version", choose(-1)),
      right = iconButton("right", "Next version", choose(1));
    left.disabled = at === 0;
    right.disabled = at === versions.length - 1;
    box.append(left, make("span", "versions", `${at + 1}/${versions.length}`), right);
  }
  const copy = iconButton("copy", "Copy", () => copyText(message.content, copy));
  box.append(
    copy,
    iconButton("edit", "Edit", () => startEdit(message.id)),
  );
  if (message.role === "assistant") {
    const look = iconButton("inside", "Look inside", () => {
      if (!looked.delete(message.id)) looked.add(message.id);
      draw();
    });
    look.setAttribute("aria-expanded", looked.has(message.id));
    box.append(
      iconButton("retry", "Regenerate", () => answer({ id: message.after }, message.slot)),
      look,
    );
  }
  box.append(iconButton("delete", "Delete message", () => remove(message)));
  return box;
}

function startEdit(id) {
  editing = id;
  draw();
  const area = drawn.get(id).element.querySelector("textarea");
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function endEdit() {
  const id = editing;
  editing = null;
  draw();
  drawn.get(id)?.element.querySelector("[data-act=edit]")?.focus();
}

function editor(message) {
  const area = make("textarea"),
    isUser = message.role === "user";
  area.value = message.content;
  area.rows = Math.min(12, message.content.split("\n").length + 1);
  area.setAttribute("aria-label", isUser ? "Edit the message" : "Edit the answer");
  const save = () => {
    const text = area.value.trim();
    if (!text) return;
    if (isUser && current()) return toast(BUSY);
    editing = null;
    edit(message, text);
    $("input").focus();
  };
  area.addEventListener("keydown", event => {
    if (event.key === "Escape") {
      event.stopPropagation();
      endEdit();
    }
    if (event.key === "Enter" && (sendsWithEnter(event) || event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      save();
    }
  });
  const row = make("div", "row", textButton("Cancel", endEdit), textButton(isUser ? "Send" : "Save", save, "main"));
  return make("div", "editor", area, row);
}

// Shows a growing answer in the next frame.
function grow(reply) {
  if (reply.chat !== chat.id || growing) return;
  growing = requestAnimationFrame(() => {
    growing = null;
    if (performance.now() < pause) return void setTimeout(grow, 30, reply);
    const element = drawn.get(reply.id)?.element,
      began = performance.now();
    if (!element || reply.chat !== chat.id || !writing.has(reply.id)) return;
    showText(element.querySelector(".text"), reply);
    drawMeter();
    keepUp();
    pause = performance.now() + 3 * (performance.now() - began);
  });
}

function follow(does) {
  following = does;
  $("newest").hidden = does;
}

const isAtEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < NEAR;

function keepUp() {
  if (following) $("log").scrollTop = $("log").scrollHeight;
  else $("newest").hidden = isAtEnd();
}

function drawMeter() {
  const meter = $("meter");
  meter.hidden = !model;
  if (!model) return;
  const used = Math.min(model.context, tokensUsed($("input").value)),
    share = used / model.context;
  meter.style.setProperty("--share", `${Math.min(100, share * 100)}%`);
  meter.classList.toggle("full", share > 0.9);
  meter.setAttribute("aria-valuenow", used);
  meter.setAttribute("aria-valuemax", model.context);
  const text = `${number(used)} of ${number(model.context)} tokens`;
  meter.setAttribute("aria-valuetext", text);
  meter.querySelector("span").textContent = `${number(used)} / ${number(model.context)}`;
  const cache = bytesAs(used * model.cache_bytes_per_token),
    dense = bytesAs(used * model.dense_cache_bytes_per_token);
  const sizes = model.cache_bytes_per_token ? `; the cache holds ${cache}, dense attention would hold ${dense}` : "";
  meter.title = `${text} of the context are used${sizes}`;
}

// Tells screen readers, which would not follow a growing text.
const say = text => {
  $("spoken").textContent = text;
};
