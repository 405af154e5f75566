// The page's behaviour: asks the sidecar for JSON, draws it, and records clicks.

const LISTS = ["hiertcn", "mv", "popularity"];
const LENGTH = 20;
const POLL_MS = 2000;
const KEPT_POLLS = 60;
const LATENCY_POLLS = 5;
const TOKEN_KEY = "hiertcn-token";

const byId = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
const when = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });
const ago = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

/** The user shown and what was last drawn for them. */
const shown = { user: null, view: null, request: 0 };

class Refusal extends Error {
  constructor(sentence, status) {
    super(sentence);
    this.status = status;
  }
}

async function ask(path, body) {
  const headers = {};
  const token = sessionStorage.getItem(TOKEN_KEY);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
    });
  } catch {
    throw new Refusal("The sidecar does not answer; see whether hiertcn serve still runs.", 0);
  }
  const found = await reply.json().catch(() => ({}));
  if (!reply.ok) {
    if (reply.status === 401) askForToken();
    throw new Refusal(found.error ?? `The sidecar answered ${reply.status}.`, reply.status);
  }
  return found;
}

function askForToken() {
  const dialog = byId("access");
  if (!dialog.open) dialog.showModal();
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

function complain(error) {
  const place = byId("error");
  place.hidden = !error;
  place.textContent = error ? sentence(error.message) : "";
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const nameOf = (item) => item.title || item.item_id;

function relative(us, nowUs) {
  const seconds = (us - nowUs) / 1e6;
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (Math.abs(seconds) >= size) return ago.format(Math.round(seconds / size), unit);
  }
  return "just now";
}

// Users

async function suggest() {
  const { users } = await ask("/api/users");
  byId("suggested").replaceChildren(...users.map((user) => element("option", { value: user })));
  byId("picks").replaceChildren(
    ...users.slice(0, 8).map((user) => {
      const pick = element("button", { type: "button", class: "pick" }, user);
      pick.addEventListener("click", () => show(user));
      return pick;
    }),
  );
}

async function show(user, told = null) {
  const request = ++shown.request;
  byId("user").value = user;
  document.body.setAttribute("aria-busy", "true");
  try {
    const seen = byId("seen").checked ? "hide" : "show";
    const view = await ask(
      `/api/user?id=${encodeURIComponent(user)}&k=${LENGTH}&seen=${seen}`,
    );
    if (request !== shown.request) return;
    const before = shown.user === user ? shown.view : null;
    shown.user = user;
    shown.view = view;
    const hash = `#user=${encodeURIComponent(user)}`;
    if (location.hash !== hash) history.replaceState(null, "", hash);
    drawSessions(view);
    const moved = LISTS.map((list) => drawList(list, view.lists[list], before?.lists[list]));
    for (const field of byId("other").elements) field.disabled = false;
    for (const pick of document.querySelectorAll(".pick")) {
      pick.setAttribute("aria-pressed", String(pick.textContent === user));
    }
    complain(null);
    byId("said").textContent = told
      ? `${told} ${changes(moved[0])}`
      : view.known
        ? ""
        : `Nothing is known of ${user}: HierTCN ranks from the start state.`;
  } catch (error) {
    if (request === shown.request) complain(error);
  } finally {
    if (request === shown.request) document.body.removeAttribute("aria-busy");
  }
}

function changes({ fresh, moved }) {
  if (!fresh && !moved) return "The HierTCN list stays as it was.";
  return `In the HierTCN list ${fresh} of ${LENGTH} items are new and ${moved} moved.`;
}

async function record(itemId, name) {
  const user = shown.user;
  if (user === null) return;
  try {
    const result = await ask("/api/interactions", { user_id: user, item_id: itemId });
    const told = result.unknown_items.length
      ? `Recorded ${name}, which this release does not know: it is kept for training.`
      : result.late
        ? `Recorded ${name}, too late for the user's state: it is kept for training.`
        : `Recorded ${name} for ${user}.`;
    await show(user, told);
  } catch (error) {
    complain(error);
  }
}

// Sessions

function drawSessions(view) {
  const place = byId("sessions");
  if (!view.sessions.length) {
    const words = view.known ? "No interactions within reach." : "No sessions: a new user.";
    place.replaceChildren(element("p", { class: "quiet" }, words));
    return;
  }
  const parts = view.sessions.map((session, index) => {
    const last = session.items[session.items.length - 1].timestamp_us;
    const count = session.items.length === 1 ? "1 item" : `${session.items.length} items`;
    const title = session.open ? "Open session" : relative(last, view.now_us);
    const time = element(
      "time",
      { datetime: new Date(last / 1000).toISOString(), title: when.format(last / 1000) },
      title,
    );
    return element(
      "details",
      { class: session.open ? "session open" : "session", open: session.open || index === 0 },
      element("summary", {}, time, element("span", { class: "count" }, count)),
      element(
        "ol",
        { reversed: true },
        ...session.items.toReversed().map((item) =>
          element(
            "li",
            {},
            element("span", { class: "name" }, nameOf(item)),
            item.title && element("span", { class: "id" }, item.item_id),
          ),
        ),
      ),
    );
  });
  if (view.older_sessions) {
    const older = whole.format(view.older_sessions);
    parts.push(element("p", { class: "quiet" }, `and ${older} older`));
  }
  place.replaceChildren(...parts);
}

// Lists

function drawList(name, list, before) {
  const section = document.querySelector(`[data-list="${name}"]`);
  const place = section.querySelector("ol");
  const tops = new Map(
    [...place.children].map((row) => [row.dataset.item, row.getBoundingClientRect().top]),
  );
  const focused = place.contains(document.activeElement)
    ? document.activeElement.dataset.item
    : null;
  const ranks = before ? new Map(before.items.map((item, rank) => [item.item_id, rank])) : null;
  const scores = list.items.map((item) => item.score ?? 0);
  const [highest, lowest] = [Math.max(...scores), Math.min(...scores)];
  let fresh = 0;
  let moved = 0;
  const rows = list.items.map((item, rank) => {
    let change = null;
    if (ranks) {
      const old = ranks.get(item.item_id);
      if (old === undefined) {
        fresh += 1;
        change = element("span", { class: "change new" }, "new");
      } else if (old !== rank) {
        moved += 1;
        const up = old > rank;
        const by = Math.abs(old - rank);
        change = element(
          "span",
          { class: up ? "change up" : "change down", "aria-label": `${up ? "up" : "down"} ${by}` },
          `${up ? "▲" : "▼"}${by}`,
        );
      }
    }
    const score = item.score == null ? "–" : item.score.toFixed(3);
    const button = element(
      "button",
      { type: "button", "data-item": item.item_id, title: `Record a click on ${nameOf(item)}` },
      element("span", { class: "rank" }, String(rank + 1)),
      element(
        "span",
        { class: "what-it-is" },
        element("span", { class: "name" }, nameOf(item)),
        item.title && element("span", { class: "id" }, item.item_id),
      ),
      element("span", { class: "moved" }, change),
      element("span", { class: "score" }, score),
      element("span", { class: "unseen" }, "Record a click"),
    );
    // The best item's bar is full and the last one's a tenth: scores compare within a list only.
    const span = highest - lowest;
    const share = span > 0 ? 0.1 + 0.9 * (((item.score ?? lowest) - lowest) / span) : 1;
    button.style.setProperty("--share", share.toFixed(3));
    button.addEventListener("click", () => record(item.item_id, nameOf(item)));
    return element("li", { "data-item": item.item_id }, button);
  });
  if (!rows.length) {
    const words = name === "mv" ? "No session to take a mean of yet." : "Nothing to recommend.";
    rows.push(element("li", { class: "quiet" }, words));
  }
  place.replaceChildren(...rows);
  if (name === "hiertcn") section.classList.toggle("fallback", list.fallback);
  section.querySelector("[data-what]").textContent = explain(name, list);
  slide(rows, tops);
  if (focused !== null) {
    (place.querySelector(`button[data-item="${CSS.escape(focused)}"]`) ??
      place.querySelector("button"))?.focus({ preventScroll: true });
  }
  return { fresh, moved };
}

function explain(name, list) {
  if (name === "mv") {
    return list.of
      ? `Nearest to the mean vector of the ${list.of}.`
      : "Nearest to the mean vector of one session.";
  }
  if (name === "popularity") return "What everyone looks at, live counts first.";
  return list.fallback
    ? "Fallback: the models did not answer in time, so a simpler ranking did."
    : "The served model: every past session and the open one.";
}

function slide(rows, tops) {
  if (!tops.size || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const row of rows) {
    const old = tops.get(row.dataset.item);
    const by = old === undefined ? null : old - row.getBoundingClientRect().top;
    if (by === null) {
      row.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 400 });
    } else if (by) {
      row.animate([{ transform: `translateY(${by}px)` }, { transform: "none" }], {
        duration: 350,
        easing: "ease-out",
      });
    }
  }
}

// Live figures

const polls = [];
const series = { rate: [], p50: [] };

async function poll() {
  if (!document.hidden && !byId("access").open) {
    try {
      const status = await ask("/api/status");
      if (byId("error").dataset.of === "status") complain(null);
      delete byId("error").dataset.of;
      polls.push(status);
      if (polls.length > LATENCY_POLLS) polls.shift();
      drawStatus(status);
    } catch (error) {
      complain(error);
      byId("error").dataset.of = "status";
    }
  }
  setTimeout(poll, POLL_MS);
}

function drawStatus(status) {
  const release = byId("release");
  release.textContent = String(status.release);
  release.title =
    `${whole.format(status.items)} items, ${whole.format(status.users)} users, ` +
    `events up to ${when.format(status.watermark_us / 1000)}`;
  byId("fallbacks").textContent = whole.format(status.fallbacks);
  const before = polls.length > 1 ? polls[polls.length - 2] : null;
  // Who was restarted counts from 0 again, and one process more or less counts otherwise.
  if (
    before === null ||
    before.uptime_s > status.uptime_s ||
    before.processes !== status.processes ||
    answered(before) > answered(status)
  ) {
    polls.splice(0, polls.length, status);
    return;
  }
  const rate = (answered(status) - answered(before)) / (status.uptime_s - before.uptime_s);
  byId("rate").textContent = rate < 100 ? rate.toFixed(1) : whole.format(Math.round(rate));
  draw("rate", rate);
  const p50 = quantile(0.5);
  draw("p50", p50);
  byId("p50").textContent = milliseconds(p50);
  byId("p99").textContent = milliseconds(quantile(0.99));
}

const answered = (status) =>
  Object.values(status.requests)
    .flatMap((codes) => Object.values(codes))
    .reduce((sum, count) => sum + count, 0);

const milliseconds = (seconds) => {
  if (seconds === null) return "–";
  if (seconds === Infinity) return "> 5 s";
  return `${(seconds * 1000).toPrecision(2)} ms`;
};

/** A quantile of Recommend's seconds over the last polls, linear within a bucket; null of none. */
function quantile(share) {
  const [first, last] = [polls[0], polls[polls.length - 1]];
  const now = last.latency.Recommend;
  if (!now) return null;
  const old = first.latency.Recommend ?? now.map(() => 0);
  const counts = now.map((count, bucket) => count - old[bucket]);
  const total = counts[counts.length - 1];
  if (total <= 0) return null;
  const wanted = share * total;
  const bucket = counts.findIndex((count) => count >= wanted);
  if (bucket >= last.bounds_s.length) return Infinity;
  const [from, below] = bucket ? [last.bounds_s[bucket - 1], counts[bucket - 1]] : [0, 0];
  return from + (last.bounds_s[bucket] - from) * ((wanted - below) / (counts[bucket] - below));
}

function draw(name, value) {
  const values = series[name];
  values.push(value);
  if (values.length > KEPT_POLLS) values.shift();
  const known = values.filter((one) => one !== null && one !== Infinity);
  const top = Math.max(...known, 1e-9);
  const points = values
    .map((one, index) => [index, one])
    .filter(([, one]) => one !== null && one !== Infinity)
    .map(([index, one]) => {
      const x = 100 - (values.length - 1 - index) * (100 / (KEPT_POLLS - 1));
      return `${x.toFixed(1)},${(22 - 20 * (one / top)).toFixed(1)}`;
    });
  byId(`${name}-chart`).firstElementChild.setAttribute("points", points.join(" "));
}

// Begin

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  show(byId("user").value.trim());
});

byId("seen").addEventListener("change", () => {
  if (shown.user !== null) show(shown.user);
});

byId("other").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = byId("item");
  const item = field.value.trim();
  field.value = "";
  record(item, item);
});

byId("access").addEventListener("close", () => {
  const token = byId("token").value.trim();
  byId("token").value = "";
  if (!token) return;
  sessionStorage.setItem(TOKEN_KEY, token);
  begin();
});

for (const tab of document.querySelectorAll('input[name="shown"]')) {
  tab.addEventListener("change", () => {
    byId("lists").dataset.shown = tab.value;
  });
}

function begin() {
  complain(null);
  suggest().catch(complain);
  const user = new URLSearchParams(location.hash.slice(1)).get("user");
  if (user) show(user);
}

addEventListener("hashchange", begin);
begin();
poll();
