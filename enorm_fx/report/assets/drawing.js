"use strict";
(() => {
  const plan = JSON.parse(document.getElementById("plan").textContent);
  const drawing = document.getElementById("drawing");
  const tip = document.getElementById("tip");
  const calls = [...drawing.querySelectorAll(".call")];
  const edges = [...drawing.querySelectorAll(".edge")];
  const numbers = (element, key) => (element.dataset[key] || "").split(" ").filter(Boolean);

  // The tooltip is ours: the browser's own would come a second later, on top of it.
  const titles = new Map();
  for (const element of [...calls, ...edges]) {
    const title = element.querySelector("title");
    titles.set(element, title.textContent);
    title.remove();
  }

  // ---- view: zoom and pan by the viewBox ----
  const whole = drawing.getAttribute("viewBox").split(" ").map(Number);
  let view = [...whole];
  let fits = true; // until the reader moves
  const show = () => drawing.setAttribute("viewBox", view.join(" "));
  let size = [0, 0]; // of the stage, in pixels
  const scale = () => Math.min(drawing.clientWidth / view[2], drawing.clientHeight / view[3]);
  const zoom = (factor, x, y) => {
    fits = false;
    const by = Math.min(Math.max(view[2] / factor, 60), whole[2] * 3) / view[2];
    view = [x - (x - view[0]) * by, y - (y - view[1]) * by, view[2] * by, view[3] * by];
    show();
  };
  const fitted = () => {
    fits = true;
    // The view has the stage's shape; small networks are not blown up.
    size = [drawing.clientWidth, drawing.clientHeight];
    const shape = size[0] / Math.max(size[1], 1);
    const width = Math.max(whole[2], whole[3] * shape, drawing.clientWidth / 1.25);
    view = [whole[0], whole[1], width, width / shape];
    show();
  };
  const at = (event) => {
    const box = drawing.getBoundingClientRect();
    return [
      view[0] + ((event.clientX - box.left) / box.width) * view[2],
      view[1] + ((event.clientY - box.top) / box.height) * view[3],
    ];
  };
  const centre = () => [view[0] + view[2] / 2, view[1] + view[3] / 2];
  const goTo = (call) => {
    const box = call.getBBox();
    if (scale() < 0.8) zoom(1 / scale(), ...centre());
    fits = false;
    view[0] = box.x + box.width / 2 - view[2] / 2;
    view[1] = box.y + box.height / 2 - view[3] / 2;
    show();
  };
  drawing.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * 0.0015), ...at(event));
  }, { passive: false });
  let grip = null;
  drawing.addEventListener("pointerdown", (event) => {
    grip = { x: event.clientX, y: event.clientY, view: [...view], moved: false };
  });
  window.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const [dx, dy] = [event.clientX - grip.x, event.clientY - grip.y];
    grip.moved = grip.moved || Math.abs(dx) + Math.abs(dy) > 4;
    drawing.classList.toggle("moving", grip.moved);
    fits = fits && !grip.moved;
    view[0] = grip.view[0] - dx / scale();
    view[1] = grip.view[1] - dy / scale();
    show();
  });
  window.addEventListener("pointerup", (event) => {
    if (grip && !grip.moved && drawing.contains(event.target)) chooseFrom(event.target);
    grip = null;
    drawing.classList.remove("moving");
  });
  document.getElementById("in").onclick = () => zoom(1.4, ...centre());
  document.getElementById("out").onclick = () => zoom(1 / 1.4, ...centre());
  document.getElementById("fit").onclick = fitted;
  window.addEventListener("resize", () => {
    if (fits) return fitted();
    const per = view[2] / size[0]; // the same magnification in the new size
    size = [drawing.clientWidth, drawing.clientHeight];
    view = [view[0], view[1], size[0] * per, size[1] * per];
    show();
  });
  fitted();

  // ---- groups: highlight producers, consumers and the edges between ----
  const rows = [...document.querySelectorAll(".group")];
  let chosen = null;
  const choose = (group) => {
    chosen = group === chosen ? null : group;
    drawing.classList.toggle("dimmed", chosen !== null);
    for (const row of rows) row.classList.toggle("chosen", row.dataset.group === chosen);
    for (const element of [...calls, ...edges]) {
      const on = chosen !== null && numbers(element, "groups").includes(chosen);
      element.classList.toggle("on", on);
      const ends = [...numbers(element, "takes"), ...numbers(element, "makes")];
      element.classList.toggle("ends", on && ends.includes(chosen));
      if (element.classList.contains("edge")) {
        for (const path of element.querySelectorAll("path")) {
          const colour = on ? plan.palette[Number(chosen) % plan.palette.length] : "";
          path.style[path.classList.contains("tip") ? "fill" : "stroke"] = colour;
        }
      }
    }
  };
  const chooseFrom = (target) => {
    const element = target.closest(".call, .edge");
    const groups = element ? numbers(element, "groups") : [];
    if (groups.length === 0) return choose(chosen);
    choose(groups[(groups.indexOf(chosen) + 1) % groups.length]);
  };
  for (const row of rows) {
    row.onclick = () => choose(row.dataset.group);
    const group = plan.groups[Number(row.dataset.group)];
    row.title = `multiplies ${group.producers.join(", ")}\npasses through ` +
      `${group.via.join(", ") || "nothing"}\ndivides ${group.consumers.join(", ")}`;
  }

  // ---- search ----
  const search = document.getElementById("search");
  const found = document.getElementById("found");
  let hits = [];
  let current = -1;
  const find = (text) => {
    const wanted = text.trim().toLowerCase();
    hits = wanted ? calls.filter((call) => call.dataset.find.includes(wanted)) : [];
    current = -1;
    for (const call of calls) call.classList.toggle("hit", hits.includes(call));
    found.textContent = wanted ? `${hits.length} found` : "";
  };
  const next = () => {
    if (hits.length === 0) return;
    current = (current + 1) % hits.length;
    goTo(hits[current]);
    found.textContent = `${current + 1} of ${hits.length}`;
  };
  search.addEventListener("input", () => find(search.value));
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") next();
  });
  for (const row of document.querySelectorAll(".pinned")) {
    row.onclick = () => {
      search.value = row.dataset.weight;
      find(search.value);
      next();
    };
  }
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    search.value = "";
    find("");
    choose(chosen);
  });

  // ---- tooltips ----
  drawing.addEventListener("pointermove", (event) => {
    const element = event.target.closest(".call, .edge");
    tip.hidden = !element || Boolean(grip && grip.moved);
    if (tip.hidden) return;
    tip.textContent = titles.get(element);
    const right = event.clientX + 16 + tip.offsetWidth < window.innerWidth;
    tip.style.left = `${right ? event.clientX + 14 : event.clientX - tip.offsetWidth - 10}px`;
    const low = Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8);
    tip.style.top = `${low}px`;
  });
  drawing.addEventListener("pointerleave", () => { tip.hidden = true; });
})();
