// Draws the steps of the scan, which the build took from the package, and moves between them.
(() => {
  "use strict";
  const SECONDS = 1.6;
  const COLUMN = 60, LEVEL = 66, WIDE = 50, HIGH = 40;

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  function draw(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function start(root) {
    const { vocabulary, documents, trie, root: top, steps } = JSON.parse(root.querySelector("script").textContent);
    let current = 0;
    let timer = null;

    const said = make("p", { className: "scan-said" });
    said.setAttribute("aria-live", "polite");

    // The text: one line per document, one element per token.
    const tokens = documents.map((line) => line.map((token) => make("span", { textContent: vocabulary[token] })));
    const lines = make("div", { className: "scan-text" }, ...tokens.map((line) => make("div", {}, ...line)));

    // The rows: a stack of squares per token.
    const stacks = vocabulary.map((word, token) => {
      const stack = make("div", { className: `scan-stack scan-colour-${token}` });
      return { stack, column: make("div", {}, stack, make("span", { textContent: word })) };
    });
    const rows = make("div", { className: "scan-rows" }, ...stacks.map(({ column }) => column));

    // The dictionary: a tree of phrases, with a place for every node.
    const x = ([column]) => column * COLUMN, y = ([, level]) => -level * LEVEL + HIGH / 2 + 4;
    const box = (at, label, number, token) => draw("g", { class: `scan-node scan-colour-${token}` },
      draw("rect", { x: x(at) - WIDE / 2, y: y(at) - HIGH / 2, width: WIDE, height: HIGH, rx: 8 }),
      draw("text", { x: x(at), y: y(at) - (number ? 4 : -4) }, label), number);
    const nodes = trie.map(({ word, parent, at }) => {
      const from = parent < 0 ? top : trie[parent].at;
      const count = draw("text", { x: x(at), y: y(at) + 13, class: "scan-count" });
      const edge = draw("line", { x1: x(from), y1: y(from), x2: x(at), y2: y(at), class: "scan-edge" });
      return { count, edge, shape: box(at, vocabulary[word], count, word) };
    });
    const depth = Math.min(...trie.map(({ at }) => at[1])), width = Math.max(...trie.map(({ at }) => at[0]));
    const svg = draw("svg", { viewBox: `0 0 ${(width + 0.5) * COLUMN} ${-depth * LEVEL + HIGH + 8}`, "aria-hidden": "true" },
      ...nodes.map(({ edge }) => edge), box(top, "start", "", "start"), ...nodes.map(({ shape }) => shape));

    const button = (label, sign, act) => {
      const element = make("button", { type: "button", title: label, textContent: sign });
      element.setAttribute("aria-label", label);
      element.addEventListener("click", act);
      return element;
    };
    const first = button("First step", "|◀\uFE0E", () => move(0));
    const previous = button("Previous step", "◀\uFE0E", () => move(current - 1));
    const play = button("Play", "▶\uFE0E Play", () => (timer ? stop() : run()));
    const next = button("Next step", "▶\uFE0E", () => move(current + 1));
    const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: 0 });
    slider.setAttribute("aria-label", "Step");
    slider.addEventListener("input", () => move(Number(slider.value)));
    const place = make("span", { className: "scan-place" });
    const controls = make("div", { className: "scan-controls" }, first, previous, play, next, slider, place);

    function show() {
      const step = steps[current];
      said.textContent = step.said;
      tokens.flat().forEach((token) => (token.className = ""));
      steps.slice(0, current + 1).forEach(({ piece, ends }, number) => {
        if (!piece) return;
        const [line, begin, end] = piece, now = number === current;
        if (!ends && !now) return;
        tokens[line].slice(begin, end).forEach((token, at, all) => {
          token.className = now ? "scan-now" : "scan-read";
          if (at === 0) token.className += " scan-begin";
          if (at === all.length - 1) token.className += now && !ends ? " scan-cursor" : " scan-end";
        });
      });
      stacks.forEach(({ stack }, token) => {
        stack.replaceChildren(...Array.from({ length: step.rows[token] }, () => make("i")));
      });
      nodes.forEach(({ shape, edge, count }, node) => {
        const known = node < step.counts.length;
        shape.classList.toggle("scan-absent", !known);
        edge.classList.toggle("scan-absent", !known);
        shape.classList.toggle("scan-zero", known && step.counts[node] === 0);
        shape.classList.toggle("scan-marked", node === step.node);
        count.textContent = known ? step.counts[node] : "";
      });
      slider.value = current;
      slider.setAttribute("aria-valuetext", step.said);
      place.textContent = `${current + 1} / ${steps.length}`;
      first.disabled = previous.disabled = current === 0;
      next.disabled = current === steps.length - 1;
    }

    function move(step) {
      stop();
      current = Math.max(0, Math.min(steps.length - 1, step));
      show();
    }

    function run() {
      if (current === steps.length - 1) current = 0;
      timer = setInterval(() => {
        current += 1;
        show();
        if (current === steps.length - 1) stop();
      }, 1000 * SECONDS);
      label("Pause", "❚❚ Pause");
      show();
    }

    function stop() {
      clearInterval(timer);
      timer = null;
      label("Play", "▶\uFE0E Play");
    }

    function label(name, sign) {
      play.textContent = sign;
      play.title = name;
      play.setAttribute("aria-label", name);
    }

    const keys = {
      ArrowLeft: () => move(current - 1),
      ArrowRight: () => move(current + 1),
      Home: () => move(0),
      End: () => move(steps.length - 1),
    };
    root.addEventListener("keydown", (event) => {
      if (event.target === slider || event.altKey || event.ctrlKey || event.metaKey || !(event.key in keys)) return;
      event.preventDefault();
      keys[event.key]();
    });

    root.tabIndex = 0;
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", "The scan, step by step; the arrow keys move between steps");
    root.append(said, make("div", { className: "scan-body" }, make("div", {}, lines, rows), svg), controls);
    show();
    root.hidden = false;
    const picture = root.previousElementSibling;
    if (picture) picture.hidden = true;
  }

  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".scan").forEach(start));
})();
