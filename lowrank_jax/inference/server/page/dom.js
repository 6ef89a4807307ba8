"use strict";
// Building blocks of the page: elements, icons, buttons, short notices.

const $ = id => document.getElementById(id);
const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), byte => byte.toString(36).padStart(2, "0")).join("");
const number = value => Math.round(value).toLocaleString("en-US");

// All text enters as a text node, so that it is never markup.
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter(child => child !== null && child !== undefined && child !== ""));
  return element;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", "#icon-" + name);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

function textButton(text, act, className = "") {
  const element = make("button", className, text);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

function iconButton(name, label, act, className = "icon") {
  const element = textButton(icon(name), act, className);
  element.setAttribute("aria-label", label);
  element.title = label;
  element.dataset.act = name;
  return element;
}

async function copyText(text, control) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // not a secure context, or not allowed
    const area = make("textarea");
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    control.focus();
  }
  control.replaceChildren(icon("check"));
  toast("Copied");
  setTimeout(() => control.replaceChildren(icon("copy")), 1500);
}

// Shows a notice for some seconds, with a button if there is something to do.
function toast(text, label = "", act = null) {
  const element = make("div", "toast", text);
  const close = () => element.remove();
  if (act)
    element.append(
      textButton(label, () => {
        close();
        act();
      }),
    );
  $("toasts").replaceChildren(element);
  setTimeout(close, act ? 10000 : 3000);
}

// Shows what went wrong until it is dismissed or solved.
function complain(text, label = "", act = null) {
  const close = iconButton("close", "Dismiss", () => $("alert").replaceChildren());
  $("alert").replaceChildren(make("div", "error", make("span", "", text), act && textButton(label, act), close));
}

function download(name, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
