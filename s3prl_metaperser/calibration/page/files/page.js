// The page of `metaperser calibrate`: one clip after the other, and at any time the model that comes of the answers.
"use strict";

// In the address that the program printed; kept by this tab alone, so that it can be reloaded.
const tokenIn = (hash) => new URLSearchParams(hash.slice(1)).get("token");
if (tokenIn(location.hash)) {
  sessionStorage.setItem("token", tokenIn(location.hash));
  history.replaceState(null, "", "/");
}
const TOKEN = sessionStorage.getItem("token") ?? "";
const MOST_BYTES = Number(document.body.dataset.mostBytes);
const MOST_SECONDS = Number(document.body.dataset.mostSeconds);
const NO_ANSWER = "The program does not answer. Start it again with the same command, and open the address that it prints: your saved answers are kept.";

const element = (id) => document.getElementById(id);
const audio = element("audio");
const boxes = [...document.querySelectorAll('input[name="emotion"]')];

let session = null; // as the server last gave it
let current = null; // number of the clip on show; null when all have an answer
let saving = false;
let comparedLabels = null; // how many labels the comparison on show was made of

// --- asking the server

class Refusal extends Error {}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { "X-Calibration-Token": TOKEN } });
  } catch {
    throw new Refusal(NO_ANSWER);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Refusal(sentence(said.message ?? `The program answered ${response.status}.`));
}

const post = async (path, body) => (await ask(path, { method: "POST", body })).json();
const get = async (path) => (await ask(path)).json();
const getUrl = async (path) => URL.createObjectURL(await (await ask(path)).blob());
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

// --- saying what went wrong

function say(id, text = "") {
  element(id).textContent = text;
}

function complain(id, error) {
  say(id, error.message);
  if (!(error instanceof Refusal)) console.error(error);
}

async function busy(control, message, work) {
  if (control.getAttribute("aria-busy") === "true") return;
  control.setAttribute("aria-busy", "true");
  say(message);
  try {
    await work();
  } catch (error) {
    complain(message, error);
  } finally {
    control.removeAttribute("aria-busy");
  }
}

// --- making elements

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const plural = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
const percent = (share) => `${Math.round(100 * share)}%`;

// --- clips

const loaded = new Map();

function load(number) {
  if (!loaded.has(number)) {
    const url = getUrl(`/clips/${number}`);
    url.catch(() => loaded.delete(number));
    loaded.set(number, url);
  }
  return loaded.get(number);
}

async function show(number, { focus = true, play = false } = {}) {
  current = number;
  audio.pause();
  audio.removeAttribute("src");
  drawPlayer();
  say("answer-message");
  element("question").hidden = number === null;
  element("done").hidden = number !== null;
  drawModelState();
  if (number === null) {
    if (focus) element("done-title").focus();
    return;
  }
  const answer = session.answers[number - 1];
  for (const box of boxes) box.checked = (answer ?? []).includes(box.value);
  say("clip-title", `Clip ${number} of ${session.answers.length}`);
  say("earlier", answer === null ? "" : answer.length ? "Your answer from before; change it if you like." : "You skipped this one; answer it if you like.");
  element("back").disabled = number === 1;
  element("forward").disabled = answer === null;
  if (focus) element("clip-title").focus();
  try {
    const url = await load(number);
    if (current !== number) return;
    audio.src = url;
    if (play) await startPlaying();
  } catch (error) {
    if (current === number) complain("answer-message", error);
    return;
  }
  if (number < session.answers.length) load(number + 1).catch(() => {}); // said when it is that clip's turn
}

const startPlaying = () => audio.play().catch(() => {}); // a browser may want to be asked; the button is there

function drawPlayer() {
  const duration = Number.isFinite(audio.duration) ? audio.duration : 0;
  const playing = !audio.paused && !audio.ended;
  element("play").classList.toggle("playing", playing);
  say("play-text", playing ? "Pause" : "Play");
  element("position").max = duration || 1;
  element("position").value = audio.currentTime;
  element("position").setAttribute("aria-valuetext", `${audio.currentTime.toFixed(1)} of ${duration.toFixed(1)} seconds`);
  say("time", duration ? `${audio.currentTime.toFixed(1)} / ${duration.toFixed(1)} s` : "");
}

function togglePlaying() {
  if (!audio.src) return;
  if (audio.paused || audio.ended) startPlaying();
  else audio.pause();
}

// --- answers

function take(state) {
  session = state;
  for (const place of document.querySelectorAll("[data-place]")) place.textContent = session.places[place.dataset.place];
  const total = session.answers.length;
  element("progress").max = total;
  element("progress").value = session.labelled + session.skipped;
  say("progress-text", `${session.labelled} of ${total} labelled${session.skipped ? `, ${session.skipped} skipped` : ""}`);
}

async function answer(path) {
  if (saving || current === null) return;
  saving = true;
  try {
    take(await post(path));
  } catch (error) {
    complain("answer-message", error);
    return;
  } finally {
    saving = false;
  }
  await show(session.next, { play: element("autoplay").checked });
}

function save() {
  const ticked = boxes.filter((box) => box.checked).map((box) => `emotion=${encodeURIComponent(box.value)}`);
  if (!ticked.length) {
    say("answer-message", "Nothing is ticked. Tick what you hear, or skip the clip.");
    return undefined;
  }
  return answer(`/clips/${current}/label?${ticked.join("&")}`);
}

const skip = () => answer(`/clips/${current}/skip`);

function back() {
  const number = current === null ? session.answers.length : current - 1;
  if (number >= 1) show(number);
}

function forward() {
  if (current === null || session.answers[current - 1] === null) return;
  show(current < session.answers.length ? current + 1 : session.next);
}

// --- the model so far

function drawModelState() {
  const labels = session.labels;
  say(
    "model-state",
    labels
      ? `Adapted to your ${plural(labels, "label")}.`
      : "It is still the generic model, that of the average listener: label a clip, and it begins to be yours.",
  );
  element("compare").disabled = !labels;
  element("download").hidden = !labels;
  const newer = comparedLabels !== null && comparedLabels !== JSON.stringify(session.answers);
  say("compare", newer ? "Update: you have answered since" : comparedLabels === null ? "Show how I differ" : "Up to date");
  element("compare").disabled ||= comparedLabels !== null && !newer;
}

async function compare() {
  const answers = JSON.stringify(session.answers);
  say("compare", "Comparing…");
  try {
    const found = await get("/model");
    const pictures = await Promise.all(["light", "dark"].map((theme) => getUrl(`/model/picture.png?theme=${theme}`)));
    comparedLabels = answers;
    drawComparison(found, pictures);
  } finally {
    drawModelState();
  }
  element("comparison-title").focus();
  say("judgement", "Checking on clips that are left out in turn…");
  try {
    say("judgement", (await get("/model/judgement")).sentence);
  } catch (error) {
    say("judgement", error.message);
  }
}

function drawComparison({ emotions, sentences, clips, change }, pictures) {
  const said = sentences.length ? sentences : ["Your model hears much as the average listener does, so far."];
  element("sentences").replaceChildren(...said.map((text) => make("li", { textContent: text })));
  [element("picture").src, element("picture-dark").srcset] = pictures;
  const columns = ["others hear", "clips", ...emotions].map((name) => make("th", { scope: "col", textContent: name }));
  const rows = emotions.map((name, row) =>
    make(
      "tr",
      {},
      make("th", { scope: "row", textContent: name }),
      make("td", { textContent: clips[row] }),
      ...change[row].map((value) => make("td", { textContent: value === null ? "–" : signed(100 * value) })),
    ),
  );
  element("changes").replaceChildren(
    make("caption", {}, make("span", { textContent: "Points of probability that you hear each emotion more or less than others" })),
    make("thead", {}, make("tr", {}, ...columns)),
    make("tbody", {}, ...rows),
  );
  element("comparison").hidden = false;
}

const signed = (points) => (Math.round(points) > 0 ? "+" : Math.round(points) < 0 ? "−" : "") + Math.abs(Math.round(points));

async function download() {
  say("download", "Preparing…");
  try {
    const href = await getUrl("/model/checkpoint");
    make("a", { href, download: session.places.out.split("/").at(-1) }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000); // it is a copy of the whole model, in memory
  } finally {
    say("download", "Download my model");
  }
}

// --- a clip of one's own

async function predict(blob, name) {
  element("heard").hidden = true;
  say("try-message");
  if (blob.size > MOST_BYTES) {
    say("try-message", `${name} is larger than ${MOST_BYTES / 2 ** 20} MB; choose a single utterance.`);
    return;
  }
  say("try-status", `Listening to ${name}…`);
  try {
    drawHeard(await post(`/predict?name=${encodeURIComponent(name)}`, blob), blob);
  } finally {
    say("try-status");
  }
}

function drawHeard({ emotions, decided, generic, personal }, blob) {
  const own = personal ?? generic;
  say("heard-title", `${personal ? "You hear" : "The average listener hears"}: ${decided.join(", ") || "nothing for certain"}`);
  const widest = Math.max(...Object.values(generic), ...Object.values(own));
  const heads = ["Emotion", ...(personal ? ["Your model"] : []), "Average listener"];
  const rows = emotions.map((name) => {
    const cells = [bar(own[name], "decides"), ...(personal ? [bar(generic[name], "")] : [])];
    const title = make("th", { scope: "row", textContent: name + (decided.includes(name) ? " ✓" : "") });
    return make("tr", { className: decided.includes(name) ? "decided" : "" }, title, ...cells);
  });
  element("probabilities").replaceChildren(
    make("caption", { textContent: "Probability of each emotion" }),
    make("thead", {}, make("tr", {}, ...heads.map((name) => make("th", { scope: "col", textContent: name })))),
    make("tbody", {}, ...rows),
  );
  const chance = `✓ marks what is above chance, 1 in ${emotions.length}.`;
  say("heard-note", personal ? chance : `${chance} You have no labels yet, so this is the generic model.`);
  element("heard-audio").src = URL.createObjectURL(blob);
  element("heard").hidden = false;
  element("heard-title").focus();

  function bar(share, className) {
    const filled = make("i");
    filled.style.width = `${(100 * share) / widest}%`;
    const cell = make("td", { className }, make("div", { className: "bar" }, make("span", {}, filled), make("b", { textContent: percent(share) })));
    cell.dataset.probability = share;
    return cell;
  }
}

let recorder = null;

async function record() {
  if (recorder) {
    recorder.stop();
    return;
  }
  say("try-message");
  if (!navigator.mediaDevices) {
    say("try-message", "This browser records on a secure address only; open the page on the computer that it runs on.");
    return;
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch {
    say("try-message", "There is no microphone that this page may use. Allow it in the browser, or choose a recording.");
    return;
  }
  recorder = new MediaRecorder(stream);
  const chunks = [];
  const limit = setTimeout(() => recorder.stop(), 1000 * (MOST_SECONDS - 1));
  recorder.ondataavailable = (event) => chunks.push(event.data);
  recorder.onstop = () => {
    clearTimeout(limit);
    for (const track of stream.getTracks()) track.stop();
    recorder = null;
    drawRecorder();
    busy(element("upload"), "try-message", async () => predict(await asWav(new Blob(chunks)), "your recording"));
  };
  recorder.start();
  drawRecorder();
}

function drawRecorder() {
  element("record").setAttribute("aria-pressed", String(recorder !== null));
  say("record", recorder ? "Stop recording" : "Record myself");
  say("try-status", recorder ? "Recording…" : "");
}

async function asWav(blob) {
  const context = new AudioContext();
  try {
    const buffer = await context.decodeAudioData(await blob.arrayBuffer());
    return new Blob([wav(buffer)], { type: "audio/wav" });
  } catch {
    throw new Refusal("The recording is empty; hold on a little before you stop it.");
  } finally {
    await context.close();
  }
}

// The first channel as 16-bit PCM: 44 bytes of header, then the samples, all little-endian.
function wav(buffer) {
  const samples = buffer.getChannelData(0);
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, characters) => [...characters].forEach((character, i) => view.setUint8(at + i, character.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, view.byteLength - 8, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, buffer.sampleRate, true);
  view.setUint32(28, 2 * buffer.sampleRate, true);
  view.setUint16(32, 2, true); // bytes a sample
  view.setUint16(34, 16, true); // bits a sample
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true));
  return view.buffer;
}

// --- stopping

async function finish() {
  element("finished").replaceChildren();
  const saved = await post("/finish");
  element("finished").replaceChildren(
    make("p", {}, "Saved: ", make("code", { textContent: saved.out }), `, from ${plural(session.labels, "label")}.`),
    make("p", { textContent: "To hear other clips with it:" }),
    make("pre", {}, make("code", { textContent: saved.next })),
  );
}

async function close() {
  await post("/close");
  for (const player of document.querySelectorAll("audio")) player.pause();
  const main = document.querySelector("main");
  // Hidden, not removed: what is under way yet, such as the player's last event, finds its place.
  for (const part of [main, document.querySelector("footer")]) part.hidden = true;
  main.after(
    make(
      "main",
      {},
      make(
        "section",
        { className: "card" },
        make("h2", { textContent: "The program is closed", id: "closed-title", tabIndex: -1 }),
        make("p", { textContent: "Your answers are kept. Start it with the same command to go on; you can close this tab." }),
      ),
    ),
  );
  document.removeEventListener("keydown", shortcut);
  element("closed-title").focus();
}

// --- keyboard

function shortcut(event) {
  const target = event.target;
  const inText = target.matches('input[type="file"], input[type="range"], audio, summary');
  if (!element("shortcuts").checked || event.ctrlKey || event.metaKey || event.altKey || session === null) return;
  const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code); // not event.key: digits are shifted on some keyboards
  const asking = current !== null;
  if (event.key === "Backspace" || (event.key === "ArrowLeft" && !inText)) back();
  else if (event.key === "ArrowRight" && !inText) forward();
  else if (!asking) return;
  else if (digit && !event.repeat) boxes[digit[1] - 1]?.click();
  else if (event.key.toLowerCase() === "p" && !event.repeat) togglePlaying();
  else if (event.key.toLowerCase() === "s" && !event.repeat) skip();
  else if (event.key === "Enter" && !event.repeat && !inText && !target.matches("button, a")) save();
  else return;
  event.preventDefault();
}

function remember(box) {
  box.checked = localStorage.getItem(box.id) !== "off";
  box.addEventListener("change", () => localStorage.setItem(box.id, box.checked ? "on" : "off"));
}

// --- beginning

for (const event of ["play", "pause", "ended", "timeupdate", "durationchange", "emptied"]) audio.addEventListener(event, drawPlayer);
element("position").addEventListener("input", (event) => (audio.currentTime = Number(event.target.value)));
element("play").addEventListener("click", togglePlaying);
element("answer").addEventListener("submit", (event) => {
  event.preventDefault();
  save();
});
element("answer").addEventListener("change", () => say("answer-message"));
element("skip").addEventListener("click", skip);
element("back").addEventListener("click", back);
element("back-from-done").addEventListener("click", back);
element("forward").addEventListener("click", forward);
element("compare").addEventListener("click", (event) => busy(event.currentTarget, "model-message", compare));
element("upload").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = ""; // so that the same file can be chosen again
  if (file) busy(event.target, "try-message", () => predict(file, file.name));
});
element("record").addEventListener("click", record);
element("download").addEventListener("click", (event) => busy(event.currentTarget, "model-message", download));
element("finish").addEventListener("click", (event) => busy(event.currentTarget, "stop-message", finish));
element("close").addEventListener("click", (event) => busy(event.currentTarget, "stop-message", close));
remember(element("shortcuts"));
remember(element("autoplay"));
document.addEventListener("keydown", shortcut);
addEventListener("hashchange", () => tokenIn(location.hash) && location.reload()); // a new address, in the same tab

get("/session").then(
  (state) => {
    take(state);
    show(session.next, { focus: false });
  },
  (error) => say("progress-text", error.message),
);
