"use strict";
// A look inside an answer: each token's probability as a shade, its alternatives, its speed, and the cache's size.

const MOST_SURPRISE = 6; // nats: a token of 0.25 % has the full shade
const percent = logprob => {
  const p = Math.exp(logprob) * 100;
  return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};
const visible = text => text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";
const bytesAs = n => (n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e3).toFixed(n >= 1e4 ? 0 : 1)} kB`);
const FINISH = { stop: "the model ended it", length: "limit of new tokens", context: "the context is full" };

// Returns tokens as units that can be shown: those that are parts of one character are together.
function unitsOf(tokens) {
  const units = [];
  let bytes = []; // of the last unit, as long as its character may lack some
  tokens.forEach((token, i) => {
    if (bytes.length && token.bytes) units.at(-1).logprob += token.logprob;
    else units.push({ ...token, at: i });
    bytes = token.bytes ? [...bytes, ...token.bytes] : [];
    if (!bytes.length) return;
    const text = new TextDecoder().decode(new Uint8Array(bytes));
    units.at(-1).text = text;
    if (!text.includes("\ufffd") || bytes.length > 3) bytes = [];
  });
  return units;
}

// Returns the answer's tokens, shaded: a list in which the arrow keys move, and a card that shows one of them.
function tokenView(reply, takeOther) {
  const units = unitsOf(reply.tokens),
    card = make("div", "card"),
    list = make("div", "tokens");
  card.setAttribute("aria-live", "polite");
  list.tabIndex = 0;
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", "Tokens of the answer. The arrow keys move.");
  let pinned = -1;
  const show = (i, pin) => {
    if (pin) {
      list.children[pinned]?.setAttribute("aria-selected", "false");
      pinned = i;
      list.children[i].setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", list.children[i].id);
    }
    showToken(card, reply, units[i], takeOther);
  };
  units.forEach((unit, i) => {
    const element = make("span", "token", unit.text);
    element.id = `token-${reply.id}-${i}`;
    element.setAttribute("role", "option");
    element.setAttribute("aria-selected", "false");
    element.setAttribute("aria-label", `${visible(unit.text)}, ${percent(unit.logprob)}`);
    element.style.setProperty("--doubt", `${Math.min(100, Math.round((unit.logprob / -MOST_SURPRISE) * 100))}%`);
    list.append(element);
  });
  const indexOf = event => [...list.children].indexOf(event.target.closest(".token"));
  list.addEventListener("mouseover", event => {
    if (indexOf(event) >= 0 && pinned < 0) show(indexOf(event), false);
  });
  list.addEventListener("click", event => {
    if (indexOf(event) >= 0) show(indexOf(event), true);
  });
  list.addEventListener("focus", () => {
    if (pinned < 0 && units.length && list.matches(":focus-visible")) show(0, true);
  });
  list.addEventListener("keydown", event => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -units.length, End: units.length };
    if (!(event.key in steps)) return;
    event.preventDefault();
    show(Math.max(0, Math.min(units.length - 1, pinned + steps[event.key])), true);
    list.children[pinned].scrollIntoView({ block: "nearest" });
  });
  if (units.length)
    showToken(
      card,
      reply,
      units.reduce((a, b) => (b.logprob < a.logprob ? b : a)),
      takeOther,
    );
  return [list, card];
}

function showToken(card, reply, unit, takeOther) {
  const head = make("div", "card-head", make("code", "", visible(unit.text)), ` ${percent(unit.logprob)}`);
  const isChosen = other => other[0] === reply.tokens[unit.at].text;
  const shown = unit.top.some(isChosen) ? unit.top : [...unit.top, [reply.tokens[unit.at].text, unit.logprob]];
  const rows = shown.map(([text, logprob]) => {
    const bar = make("span", "bar");
    bar.style.setProperty("--share", `${Math.exp(logprob) * 100}%`);
    const row = textButton(make("code", "", visible(text)), () => takeOther(unit.at, text, logprob), "other");
    row.append(bar, make("span", "share", percent(logprob)));
    const takes = !isChosen([text]) && !text.includes("\ufffd") && !/^<.*>$/.test(text);
    row.disabled = !takes;
    row.title = takes ? "Go on from here with this token" : "";
    if (isChosen([text])) row.classList.add("chosen");
    return row;
  });
  const hint = rows.some(row => !row.disabled) ? make("p", "hint", "Choose another token to go on from there.") : null;
  card.replaceChildren(head, make("div", "others", ...rows), hint ?? "");
}

// Returns the answer's numbers, and the cache beside that of dense attention.
function statsView(reply) {
  const { stats, usage, tokens } = reply,
    list = make("dl", "stats");
  const entry = (name, value) => list.append(make("div", "", make("dt", "", name), make("dd", "", value)));
  if (stats?.seconds > 0 && stats.tokens > 0) entry("Speed", `${number(stats.tokens / stats.seconds)} tokens/s`);
  if (stats?.first)
    entry("First token after", stats.first < 1 ? `${number(stats.first * 1000)} ms` : `${stats.first.toFixed(1)} s`);
  if (usage) entry("Tokens", `${number(usage.prompt)} read, ${number(stats?.tokens || usage.completion)} written`);
  entry(
    "Finished",
    reply.state === "stopped" ? "stopped by you" : (FINISH[reply.finish] ?? (reply.finish || reply.state)),
  );
  if (tokens?.length) {
    const mean = tokens.reduce((sum, token) => sum + token.logprob, 0) / tokens.length;
    entry("Perplexity", Math.exp(-mean).toFixed(2));
  }
  const view = [list];
  if (usage && model?.cache_bytes_per_token) view.push(cacheView(usage.prompt + usage.completion));
  return view;
}

function cacheView(tokens) {
  const sizes = [
    ["This model's cache", model.cache_bytes_per_token],
    ["Dense attention's", model.dense_cache_bytes_per_token],
  ];
  const rows = sizes.map(([name, bytes]) => {
    const bar = make("span", "bar");
    bar.style.setProperty("--share", `${(100 * bytes) / model.dense_cache_bytes_per_token}%`);
    return make("div", "cache-row", make("span", "", name), bar, make("span", "share", bytesAs(tokens * bytes)));
  });
  return make("div", "cache", ...rows);
}
