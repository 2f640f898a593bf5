// The start page: sends the rater's name to the server, then opens the vote page.
"use strict";

// Shows the server that a repeated request, after a lost reply, comes from the same person.
const key = [...crypto.getRandomValues(new Uint8Array(16))].join("-");

document.getElementById("start").addEventListener("submit", async (event) => {
  event.preventDefault();
  const message = document.getElementById("message");
  try {
    const response = await fetch("/api/start", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name: document.getElementById("name").value, key }),
    });
    if (response.ok) location.assign("/");
    else message.textContent = await response.text();
  } catch {
    message.textContent = "The server does not answer. Try again.";
  }
});
