"use strict";
// Markdown as DOM: marked parses it, DOMPurify lets through the few tags that it needs.

const TAGS = "p br strong em del code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 hr a table thead tbody tr th td".split(
  " ",
);
const PURE = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};
const escaped = text => text.replace(/[&<>"']/g, letter => `&#${letter.charCodeAt(0)};`);

marked.use({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)), // a model's HTML is text
    image: ({ text, href }) => escaped(text || href), // an image would tell another site that it was seen
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
  },
});

// Shows Markdown in the element. Unchanged blocks stay, so that a growing text does not move or lose a selection.
function showMarkdown(element, text) {
  let blocks;
  try {
    blocks = marked.lexer(text).filter(block => block.type !== "space");
  } catch {
    // nested too deeply
    blocks = [{ raw: text }];
  }
  blocks.forEach((block, i) => {
    const old = element.children[i];
    if (old?.raw === block.raw) return;
    const node = make("div", "block");
    node.raw = block.raw;
    try {
      node.append(DOMPurify.sanitize(marked.parser([block]), PURE));
    } catch {
      node.append(block.raw);
    }
    finishBlock(node);
    if (old) old.replaceWith(node);
    else element.append(node);
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
}

function finishBlock(node) {
  for (const link of node.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const table of node.querySelectorAll("table")) scrollable(table, "table", "Table");
  for (const pre of node.querySelectorAll("pre")) {
    const language = pre.firstElementChild?.className.match(/language-(\S+)/)?.[1] ?? "code";
    const copy = iconButton("copy", "Copy code", () => copyText(pre.textContent.replace(/\n$/, ""), copy));
    const box = scrollable(pre, "code", `Code: ${language}`);
    box.before(make("div", "code-bar", make("span", "", language), copy));
  }
}

// Puts the element into a box that scrolls sideways, also by keyboard.
function scrollable(element, className, label) {
  const box = make("div", "scrolls " + className);
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", label);
  element.replaceWith(box);
  box.append(element);
  return box;
}
