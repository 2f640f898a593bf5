// The page to vote on. The server says what to show (see Survey.state); an answer is sent as a list of numbers, one for
// each image in the order shown, and the next screen comes with the word that it is stored.
"use strict";

const $ = (id) => document.getElementById(id);
const page = document.body.dataset; // mode, ties, questions, hint; state: loading, ready, saving or done

let screen = null; // task, prompt, question, text, number, images
let last = null; // the answer that Undo takes back
let marks = []; // by place, in the modes that need several: ranks or points, 0 for none yet
let preloaded = [];

// ---- modes: what can be answered, with which keys

const PAIR = [
  { label: "Image 1", keys: ["ArrowLeft", "1"], answer: [1, 0] },
  { label: "Both alike", keys: [" ", "0"], answer: [0.5, 0.5], isTie: true },
  { label: "Image 2", keys: ["ArrowRight", "2"], answer: [0, 1] },
];
const CHOICES = {
  pairs: page.ties ? PAIR : PAIR.filter((choice) => !choice.isTie),
  tag: [
    { label: "No", keys: ["ArrowLeft", "n", "1"], answer: [0] },
    { label: "Yes", keys: ["ArrowRight", "y", "2"], answer: [1] },
  ],
};
const choices = CHOICES[page.mode];
const KEYS = {
  pairs: `Keys: ← and → choose, ${page.ties ? "space is for both alike, " : ""}Backspace takes the last answer back, Z enlarges.`,
  tag: "Keys: ← is no, → is yes, Backspace takes the last answer back, Z enlarges.",
  rank: "Keys: 1, 2, ... choose an image, Enter saves, Backspace takes the last choice back, Z enlarges.",
  points: "Keys: 1 to 5 give the framed image points, Enter saves, Backspace takes the last points back, Z enlarges.",
};

function rank(place) {
  if (marks[place]) {
    const removed = marks[place];
    marks = marks.map((mark) => (mark === removed ? 0 : mark > removed ? mark - 1 : mark));
  } else {
    marks[place] = Math.max(...marks) + 1;
    if (Math.max(...marks) === marks.length - 1) marks[marks.indexOf(0)] = marks.length; // only one is left
  }
  drawMarks();
}

function give(place, points) {
  marks[place] = points;
  drawMarks();
}

const isComplete = () => marks.length > 0 && marks.every((mark) => mark > 0);

function unmark() {
  if (page.mode === "rank") rank(marks.indexOf(Math.max(...marks)));
  else give(marks.findLastIndex((mark) => mark > 0), 0);
}

// ---- what is drawn

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show(state) {
  screen = state.now;
  last = state.last;
  $("bar").max = Math.max(state.total, 1);
  $("bar").value = state.done;
  $("count").textContent = `${Math.min(state.done + 1, state.total)} of ${state.total}`;
  $("undo").disabled = !last;
  $("images").replaceChildren();
  $("answers").replaceChildren();
  marks = [];
  preloaded = state.next_images.map((id) => Object.assign(new Image(), { src: `/image/${id}` }));
  if (screen) ask();
  else thank();
}

function thank() {
  page.state = "done";
  $("prompt").textContent = $("hint").textContent = $("keys").textContent = "";
  $("question").textContent = "That was all. Thank you!";
}

async function ask() {
  page.state = "loading";
  const several = Number(page.questions) > 1;
  $("prompt").textContent = screen.prompt || "The prompt doesn't matter here.";
  $("prompt").classList.toggle("hidden-prompt", !screen.prompt);
  $("question").textContent = screen.text;
  $("question").dataset.number = several ? `${screen.number}/${page.questions}` : "";
  $("hint").textContent = page.hint;
  $("keys").textContent = KEYS[page.mode];
  const images = screen.images.map((id, place) =>
    element("img", { src: `/image/${id}`, alt: `Image ${place + 1}`, draggable: false }));
  $("images").dataset.count = images.length;
  $("images").replaceChildren(...images.map(figure));
  if (choices) $("answers").replaceChildren(...choices.map(choiceButton));
  else {
    marks = images.map(() => 0);
    $("answers").replaceChildren(element("button", { id: "save", className: "primary", textContent: "Save", onclick: () => send(marks) }));
    drawMarks();
  }
  const shown = screen;
  try {
    await Promise.all(images.map((image) => image.decode()));
    if (screen === shown) page.state = "ready";
  } catch {
    if (screen === shown) say("An image can't be shown. Reload the page; if that doesn't help, tell whoever sent you here.");
  }
}

function figure(image, place) {
  image.onclick = () => (page.mode === "rank" ? page.state === "ready" && rank(place) : zoom(place));
  const made = element("figure", {}, image);
  if (screen.images.length > 1) made.append(element("span", { className: "number", textContent: place + 1 }));
  if (page.mode === "rank") {
    made.append(element("span", { className: "mark" }));
    made.append(element("button", { className: "enlarge", textContent: "Enlarge", onclick: () => zoom(place) }));
  }
  if (page.mode === "points") {
    const buttons = [1, 2, 3, 4, 5].map((points) =>
      element("button", { textContent: points, title: `${points} of 5`, onclick: () => page.state === "ready" && give(place, points) }));
    made.append(element("div", { className: "points" }, ...buttons));
  }
  return made;
}

function choiceButton(choice) {
  return element("button", { textContent: choice.label, className: choice.isTie ? "" : "primary", onclick: () => send(choice.answer) });
}

function drawMarks() {
  const current = marks.indexOf(0);
  [...$("images").children].forEach((made, place) => {
    made.classList.toggle("marked", marks[place] > 0);
    made.classList.toggle("current", page.mode === "points" && place === current);
    if (page.mode === "rank") made.querySelector(".mark").textContent = marks[place] || "";
    made.querySelectorAll(".points button").forEach((button, k) => button.classList.toggle("primary", k + 1 === marks[place]));
  });
  $("save").disabled = !isComplete();
}

// ---- the larger image

let zoomed = 0;

function zoom(place) {
  if (!screen) return;
  zoomed = (place + screen.images.length) % screen.images.length;
  $("large").src = `/image/${screen.images[zoomed]}`;
  $("large").alt = $("which").textContent = screen.images.length > 1 ? `Image ${zoomed + 1}` : "";
  $("other").hidden = screen.images.length < 2;
  if (!$("zoom").open) {
    $("zoom").classList.remove("actual");
    $("zoom").showModal();
  }
}

$("large").onclick = () => $("zoom").classList.toggle("actual");
$("other").onclick = () => zoom(zoomed + 1);
$("close").onclick = () => $("zoom").close();
$("zoom").onclick = (event) => event.target.tagName !== "IMG" && event.target.tagName !== "BUTTON" && $("zoom").close();

// ---- the server

const say = (text) => ($("message").textContent = text);
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// Asks until there is an answer: the server takes a repeated vote or undo for one.
async function call(path, body) {
  const request = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    const response = await fetch(path, request).catch(() => null);
    if (response && response.status < 500) return response;
    say("Not stored yet: the server doesn't answer. Trying again ...");
    await pause(wait);
  }
}

async function turn(path, body) {
  page.state = "saving";
  let response = await call(path, body);
  say("");
  if (!response.ok) {
    say(await response.text());
    response = await call("/api/state");
  }
  if (response.ok) show(await response.json());
}

function send(answer) {
  if (page.state === "ready") turn("/api/vote", { task: screen.task, question: screen.question, answer });
}

function undo() {
  if (last && (page.state === "ready" || page.state === "done")) turn("/api/undo", last);
}

// ---- keys

function press(event) {
  const onControl = event.target.closest("button") && (event.key === " " || event.key === "Enter");
  if ($("me").open || event.repeat || event.ctrlKey || event.metaKey || event.altKey || onControl) return;
  if ($("zoom").open) {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") zoom(zoomed + (event.key === "ArrowLeft" ? -1 : 1));
    else if (event.key.toLowerCase() === "z") $("zoom").close();
    return;
  }
  if (event.key === " " || event.key === "Backspace") event.preventDefault();
  if (event.key === "Backspace") marks.some((mark) => mark > 0) ? unmark() : undo();
  else if (page.state !== "ready") return;
  else if (event.key.toLowerCase() === "z") zoom(0);
  else if (choices) choices.filter((choice) => choice.keys.includes(event.key.length > 1 ? event.key : event.key.toLowerCase())).forEach((choice) => send(choice.answer));
  else if (event.key === "Enter" && isComplete()) send(marks);
  else if (page.mode === "rank" && event.key >= "1" && event.key <= String(Math.min(marks.length, 9))) rank(Number(event.key) - 1);
  else if (page.mode === "points" && event.key >= "1" && event.key <= "5" && marks.includes(0)) give(marks.indexOf(0), Number(event.key));
}

document.addEventListener("keydown", press);
$("undo").onclick = undo;
$("link").value = new URL($("link").value, location.origin).href;
$("link").onfocus = () => $("link").select();
$("leave").onclick = () => $("me").showModal();
$("stay").onclick = () => $("me").close();
$("forget").onclick = async () => {
  await call("/api/leave", {});
  location.assign("/");
};
turn("/api/state");
