"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const OUTCOMES = { rescued: "rescued", spoiled: "spoiled", good: "both good", bad: "both bad" };
  const SIDES = ["plain", "tempered"];
  const AT_ONCE = 48; // cards that are added when the end of the list comes near
  const SMALL = 128; // pixels: smaller pictures are shown with their pixels as squares
  const $ = (id) => document.getElementById(id);
  const judge = () => data.judges.indexOf($("judge").value);
  const ok = (picture) => picture.said[judge()].faults.length === 0;
  const change = (pair) => Math.abs(pair.tempered.figures[2] - pair.plain.figures[2]);
  let chosen = []; // the pairs that the filters let pass, in order
  let drawn = 0; // of them, those that have a card
  let open = -1; // the one in the viewer

  // Text goes in as text: a prompt may hold anything.
  function element(tag, options = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "class") made.className = value;
      else if (name in made) made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  function outcome(pair) {
    const [plain, tempered] = SIDES.map((side) => ok(pair[side]));
    return plain ? (tempered ? "good" : "spoiled") : tempered ? "rescued" : "bad";
  }

  function address(picture) {
    return picture.file.split("/").map(encodeURIComponent).join("/");
  }

  function image(picture, alt, full) {
    const file = address(picture);
    const made = element("img", { alt, decoding: "async", loading: full ? "eager" : "lazy" });
    made.addEventListener("load", () => made.classList.toggle("small", made.naturalWidth <= SMALL));
    made.addEventListener("error", () => {
      if (picture.thumb && made.src !== picture.thumb) made.src = picture.thumb;
    });
    made.src = full || !picture.thumb ? file : picture.thumb;
    return made;
  }

  function title(pair) {
    const prompt = data.prompts[pair.prompt];
    return `${prompt.text} · seed ${pair.seed}`;
  }

  function said(pair, side) {
    if (!data.judges.length) return side;
    return `${side} ${ok(pair[side]) ? "✓" : `✗ ${pair[side].said[judge()].faults.join(", ")}`}`;
  }

  function card(pair, index) {
    const two = element("span", { class: "two" });
    for (const side of SIDES)
      two.append(element("span", {}, image(pair[side], `${side}: ${title(pair)}`), said(pair, side)));
    const chips = element("span", { class: "chips" });
    if (data.judges.length) {
      const name = outcome(pair);
      chips.append(element("span", { class: `chip ${name}` }, OUTCOMES[name]));
    }
    chips.append(element("span", {}, `JS ${SIDES.map((s) => pair[s].figures[2].toFixed(2)).join(" → ")}`));
    if (pair.calls !== null) chips.append(element("span", {}, `${pair.calls} calls`));
    const words = element("span", { class: "words" }, title(pair));
    const made = element("button", { type: "button", class: "pair" }, two, words, chips);
    made.addEventListener("click", () => view(index));
    return made;
  }

  function draw() {
    const until = Math.min(chosen.length, drawn + AT_ONCE);
    const cards = chosen.slice(drawn, until).map((pair, i) => card(pair, drawn + i));
    drawn = until;
    $("grid").append(...cards);
  }

  // Cards come as the end of the list comes near: ten thousand at once would take seconds.
  function fill() {
    const near = () => $("more").getBoundingClientRect().top < innerHeight + 800;
    while (drawn < chosen.length && near()) draw();
  }

  function passes(pair) {
    const prompt = data.prompts[pair.prompt];
    if ($("subset").value && prompt.subset !== $("subset").value) return false;
    return !$("subject").value || prompt.subjects.includes($("subject").value);
  }

  function filter() {
    const fitting = data.pairs.filter(passes);
    const counts = Object.fromEntries(Object.keys(OUTCOMES).map((name) => [name, 0]));
    if (data.judges.length) for (const pair of fitting) counts[outcome(pair)] += 1;
    for (const button of $("outcomes").querySelectorAll("button"))
      button.textContent = `${OUTCOMES[button.value]} ${counts[button.value]}`;
    const wanted = new Set(
      [...$("outcomes").querySelectorAll('[aria-pressed="true"]')].map((button) => button.value)
    );
    chosen = data.judges.length ? fitting.filter((pair) => wanted.has(outcome(pair))) : fitting;
    if ($("order").value === "dear") chosen.sort((a, b) => b.calls - a.calls);
    if ($("order").value === "gain") chosen.sort((a, b) => change(b) - change(a));
    $("grid").replaceChildren();
    drawn = 0;
    draw();
    fill();
    $("count").textContent = `${chosen.length} of ${data.pairs.length} pairs`;
  }

  // The viewer.
  function view(index) {
    if (index < 0 || index >= chosen.length) return;
    open = index;
    const pair = chosen[index];
    const prompt = data.prompts[pair.prompt];
    $("viewer-title").textContent = title(pair);
    $("stage").replaceChildren(
      ...SIDES.map((side) =>
        element(
          "figure",
          { class: side === "tempered" ? "front" : "" },
          element("figcaption", {}, side),
          element("a", { href: address(pair[side]), title: "the original file" }, image(pair[side], side, true))
        )
      )
    );
    $("told").replaceChildren(...SIDES.map((side) => told(pair[side], side)));
    $("again").textContent = `${prompt.again} --seed ${pair.seed}`;
    if (!$("viewer").open) $("viewer").showModal();
  }

  function told(picture, side) {
    const list = element("ul");
    const [ppv, npv, js] = picture.figures.map((value) => value.toFixed(3));
    data.judges.forEach((name, i) => {
      const { faults, notes } = picture.said[i];
      list.append(element("li", {}, `${name}: ${faults.join(", ") || "all OK"}`));
      for (const note of notes) list.append(element("li", { class: "quiet" }, note));
    });
    list.append(element("li", { class: "quiet" }, `CLIPSeg: PPV ${ppv}  NPV ${npv}  JS ${js}`));
    return element("div", {}, element("b", {}, side), list);
  }

  // One picture over the other, then the other one: what differs between them jumps to the eye.
  function swap() {
    const stage = $("stage");
    if (!stage.classList.contains("over")) stage.classList.add("over");
    else for (const figure of stage.children) figure.classList.toggle("front");
    $("aside").hidden = false;
  }

  function aside() {
    $("stage").classList.remove("over");
    $("aside").hidden = true;
  }

  function columns() {
    return getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
  }

  function walk(event) {
    const cards = [...$("grid").children];
    const at = cards.indexOf(document.activeElement);
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
    if (at < 0 || !by) return;
    event.preventDefault();
    if (at + by >= drawn) draw();
    $("grid").children[Math.min(drawn - 1, Math.max(0, at + by))].focus();
  }

  function viewerKey(event) {
    if (event.key === "ArrowLeft") view(open - 1);
    else if (event.key === "ArrowRight") view(open + 1);
    else if (event.key === " " && event.target.tagName !== "BUTTON") swap();
    else return;
    event.preventDefault();
  }

  function choices(select, values, all) {
    if (all) select.append(element("option", { value: "" }, all));
    for (const value of values) select.append(element("option", { value }, value));
  }

  // Whoever asks for the other look gets it, and keeps it while the page is open.
  function theme() {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  }

  choices($("judge"), data.judges);
  $("judge-choice").hidden = data.judges.length < 2;
  $("outcomes").hidden = !data.judges.length;
  choices($("subset"), new Set(data.prompts.map((prompt) => prompt.subset)), "all");
  $("subset").parentElement.hidden = new Set(data.prompts.map((prompt) => prompt.subset)).size < 2;
  choices($("subject"), [...new Set(data.prompts.flatMap((prompt) => prompt.subjects))].sort(), "any");
  for (const name of Object.keys(OUTCOMES)) {
    const button = element("button", { type: "button", value: name, class: name });
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      filter();
    });
    $("outcomes").append(button);
  }
  $("filters").addEventListener("change", filter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("grid").addEventListener("keydown", walk);
  $("viewer").addEventListener("keydown", viewerKey);
  $("viewer").addEventListener("close", () => {
    aside();
    while (open >= drawn) draw();
    $("grid").children[open]?.focus();
  });
  $("viewer").addEventListener("click", (event) => event.target === $("viewer") && $("viewer").close());
  $("before").addEventListener("click", () => view(open - 1));
  $("next").addEventListener("click", () => view(open + 1));
  $("swap").addEventListener("click", swap);
  $("aside").addEventListener("click", aside);
  $("close").addEventListener("click", () => $("viewer").close());
  $("theme").addEventListener("click", theme);
  for (const hidden of ["filters", "theme"]) $(hidden).hidden = false;
  document.querySelector(".hint").hidden = false;
  new IntersectionObserver(fill, { rootMargin: "800px" }).observe($("more"));
  filter();
})();
