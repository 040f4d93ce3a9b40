"use strict";
(() => {
  const { slides, columns } = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const controls = at("controls");
  const inputs = Object.fromEntries(
    ["search", "status", "flag", "group", "sort", "order", "view", "size"].map((id) => [id, at(id)]));
  const numbers = slides.map((slide, place) => place);
  const texts = slides.map((slide) => [
    slide.id, slide.status, slide.reason, slide.group, ...(slide.flags || []), ...(slide.notes || []), ...(slide.problems || []),
    ...(slide.odd || []).map((one) => one[1]), ...(slide.said || []).flat(),
  ].join("\n").toLowerCase());
  const collator = new Intl.Collator("en", { numeric: true });
  // What grows with trouble is shown largest first unless asked otherwise.
  const downFirst = new Set(["odd", "bad", "seconds", "distance", "tissue", "tiles"]);
  let page = 0;
  let only = null;

  const make = (name, attributes, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "text") element.textContent = value; else element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };
  const figure = (value, digits) => value === undefined ? "" :
    value.toLocaleString("en", { maximumFractionDigits: digits === undefined ? 2 : digits });
  const span = (seconds) => seconds === undefined ? "" : seconds < 90 ? `${figure(seconds, 1)} s` :
    seconds < 5400 ? `${figure(seconds / 60, 1)} min` : `${figure(seconds / 3600, 1)} h`;
  const keyOf = (slide, sort) => {
    if (sort === "id" || sort === "status" || sort === "group") return slide[sort];
    if (sort === "flags") return slide.flags ? slide.flags.join(" ") : undefined;
    if (sort === "odd") return slide.odd ? slide.odd[0][0] : undefined;
    return slide[sort];
  };

  const chosen = () => {
    const words = inputs.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const { status, flag, group } = inputs;
    const found = numbers.filter((place) => {
      const slide = slides[place];
      if (only !== null) return place === only;
      return (!status.value || slide.status === status.value)
        && (!flag.value || (flag.value === "*outlier" ? slide.odd !== undefined : (slide.flags || []).includes(flag.value)))
        && (!group || !group.value || slide.group === group.value)
        && words.every((word) => texts[place].includes(word));
    });
    const sort = inputs.sort.value;
    const way = inputs.order.value === "down" ? -1 : 1;
    return found.sort((a, b) => {
      const x = keyOf(slides[a], sort), y = keyOf(slides[b], sort);
      // Slides without the number come last, whichever the order.
      if (x === undefined || y === undefined) {
        if (x !== y) return x === undefined ? 1 : -1;
      } else {
        const order = typeof x === "string" ? collator.compare(x, y) : x - y;
        if (order) return way * order;
      }
      return collator.compare(slides[a].id, slides[b].id) || a - b;
    });
  };

  const pair = (list, name, value) => { if (value !== "") list.append(make("dt", { text: name }), make("dd", { text: value })); };

  const card = (place) => {
    const slide = slides[place];
    const box = make("article", { class: "card", "data-place": place, "aria-label": `Slide ${slide.id}` });
    box.append(make("h3", { text: slide.id }), make("span", { class: `status ${slide.status}`, text: slide.status }));
    if (slide.group) box.append(" ", make("span", { class: "quiet", text: slide.group }));
    if (slide.picture) {
      box.append(make("img", {
        src: `data:image/webp;base64,${slide.picture[2]}`, width: slide.picture[0], height: slide.picture[1],
        alt: `Slide ${slide.id}, its tissue outlined`,
      }));
    } else box.append(make("div", { class: "nopicture", text: "no picture" }));
    if (slide.flags) box.append(make("div", {}, ...slide.flags.map((flag) => make("span", { class: "flag", text: flag }))));
    if (slide.odd) box.append(make("ul", { class: "odd" }, ...slide.odd.map(([z, says]) => make("li", { text: `${says} (z ${figure(z, 1)})` }))));
    const faults = slide.problems || (slide.reason ? [slide.reason] : []);
    if (slide.reason && slide.problems && slide.status === "failed") faults.unshift(slide.reason);
    if (faults.length) box.append(make("ul", { class: "faults" }, ...[...new Set(faults)].map((text) => make("li", { text }))));
    if (slide.notes) box.append(make("ul", {}, ...slide.notes.map((text) => make("li", { text }))));
    const list = make("dl");
    pair(list, "tissue", slide.tissue === undefined ? "" : `${figure(slide.tissue)} mm² in ${slide.regions} region${slide.regions === 1 ? "" : "s"}`);
    pair(list, "tiles", slide.tiles === undefined ? "" : figure(slide.tiles) + (slide.bad ? `, ${figure(slide.bad)} bad` : ""));
    pair(list, "µm/px", slide.mpp || "");
    pair(list, "focus", figure(slide.focus));
    pair(list, "H, E", slide.haematoxylin === undefined ? "" : `${figure(slide.haematoxylin)}, ${figure(slide.eosin)} OD`);
    for (const [encoder, grid, done, chunks] of slide.encoders || []) pair(list, encoder, done === chunks ? grid : `${done} of ${chunks} chunks, ${grid}`);
    for (const [layer, count] of slide.layers || []) pair(list, layer, figure(count));
    for (const [, target, value, p, note] of slide.said || []) {
      pair(list, target, value + (p === null ? "" : ` ${p > 0.999 ? "> 0.999" : p.toFixed(3)}`) + (note ? ` (${note})` : ""));
    }
    pair(list, "last run", span(slide.seconds));
    box.append(list);
    if (slide.times) {
      const whole = slide.times.reduce((sum, [, seconds]) => sum + seconds, 0);
      const told = slide.times.filter(([, seconds]) => seconds >= 0.05 * whole).map(([kind, seconds]) => `${columns.times[kind]} ${span(seconds)}`).join(", ");
      const bar = make("div", { class: "time", role: "img", "aria-label": told, title: told });
      for (const [kind, seconds] of slide.times) {
        const part = make("i", { class: kind });
        part.style.width = `${100 * seconds / (whole || 1)}%`;
        bar.append(part);
      }
      box.append(bar, make("div", { class: "quiet", text: told }));
    }
    return box;
  };

  const table = (places) => {
    const head = make("tr");
    for (const [key, title, numeric] of columns.list) {
      const button = make("button", { type: "button", "data-sort": key, text: title });
      const cell = make("th", { scope: "col" }, button);
      if (numeric) cell.className = "n";
      if (inputs.sort.value === key) {
        cell.setAttribute("aria-sort", inputs.order.value === "down" ? "descending" : "ascending");
        button.append(inputs.order.value === "down" ? " ↓" : " ↑");
      }
      head.append(cell);
    }
    const body = make("tbody");
    for (const place of places) {
      const row = make("tr", { "data-place": place });
      for (const [key, , numeric] of columns.list) {
        const value = keyOf(slides[place], key);
        const cell = key === "id"
          ? make("td", {}, make("button", { type: "button", class: "plain", "data-id": value, text: value }))
          : make("td", { text: typeof value === "number" ? figure(value, key === "odd" || key === "seconds" ? 1 : 2) : value || "" });
        if (numeric) cell.className = "n";
        row.append(cell);
      }
      body.append(row);
    }
    return make("table", {}, make("thead", {}, head), body);
  };

  const dots = document.querySelectorAll(".plots circle");
  const show = () => {
    const found = chosen();
    const size = Number(inputs.size.value);
    const pages = Math.max(1, Math.ceil(found.length / size));
    page = Math.min(Math.max(page, 0), pages - 1);
    const places = found.slice(page * size, (page + 1) * size);
    const asList = inputs.view.value === "list";
    at("cards").hidden = asList;
    at("list").hidden = !asList;
    at("cards").replaceChildren(...(asList ? [] : places.map(card)));
    at("list").replaceChildren(...(asList ? [table(places)] : []));
    at("count").textContent = found.length === 0 ? "No slide is like that." :
      `${figure(page * size + 1)} to ${figure(page * size + places.length)} of ${figure(found.length)} slides`
      + (found.length < slides.length ? ` (${figure(slides.length)} in all)` : "");
    at("back").disabled = page === 0;
    at("next").disabled = page >= pages - 1;
    const inside = new Set(found);
    for (const dot of dots) dot.classList.toggle("dim", !inside.has(Number(dot.dataset.i)));
  };

  const naturalOrder = () => { inputs.order.value = downFirst.has(inputs.sort.value) ? "down" : "up"; };
  const goTo = () => { at("slides").scrollIntoView(); at("slides-title").focus({ preventScroll: true }); };
  const clear = () => {
    for (const id of ["status", "flag", "group", "sort"]) if (inputs[id]) inputs[id].selectedIndex = 0;
    inputs.search.value = "";
    only = null;
    page = 0;
    naturalOrder();
  };
  const places = new Map(slides.map((slide, place) => [slide.id, place]));
  const showOnly = (place) => { clear(); inputs.search.value = slides[place].id; only = place; show(); goTo(); };

  controls.addEventListener("submit", (event) => event.preventDefault());
  at("reset").addEventListener("click", () => { clear(); show(); });
  controls.addEventListener("input", (event) => {
    if (event.target === inputs.sort) naturalOrder();
    only = null;
    page = 0;
    show();
  });
  at("back").addEventListener("click", () => { page -= 1; show(); });
  at("next").addEventListener("click", () => { page += 1; show(); });
  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-id], [data-status], [data-group], [data-sort], .plots circle");
    if (!target) return;
    if (target.dataset.id !== undefined) {
      if (places.has(target.dataset.id)) showOnly(places.get(target.dataset.id));
    } else if (target.dataset.i !== undefined) showOnly(Number(target.dataset.i));
    else if (target.dataset.sort !== undefined) {
      const same = inputs.sort.value === target.dataset.sort;
      inputs.sort.value = target.dataset.sort;
      if (same) inputs.order.value = inputs.order.value === "down" ? "up" : "down"; else naturalOrder();
      page = 0;
      show();
      document.querySelector(`#list [data-sort="${target.dataset.sort}"]`).focus();
    } else if (target.dataset.status !== undefined) { clear(); inputs.status.value = target.dataset.status; show(); goTo(); }
    else { clear(); inputs.group.value = target.dataset.group; show(); goTo(); }
  });

  const tip = at("tip");
  document.addEventListener("pointermove", (event) => {
    const dot = event.target.closest ? event.target.closest(".plots circle") : null;
    tip.hidden = !dot;
    if (!dot) return;
    const slide = slides[Number(dot.dataset.i)];
    tip.textContent = slide.id + (slide.group ? ` · ${slide.group}` : "") + (slide.odd ? ` · ${slide.odd[0][1]}` : "");
    tip.style.left = `${Math.min(event.clientX + 12, window.innerWidth - 260)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });

  controls.hidden = false;
  at("pager").hidden = false;
  naturalOrder();
  show();
})();
