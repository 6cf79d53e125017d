// Passkeys have no way around a script. Forms that need one stay hidden where it cannot work.
"use strict";

async function offer(form) {
  const fields = new URLSearchParams();
  fields.set("form_token", form.elements.form_token.value);
  const answer = await fetch(form.getAttribute("action") + "/offer", { method: "POST", body: fields });
  if (!answer.ok || !(answer.headers.get("content-type") || "").includes("json")) {
    throw new Error("The page is too old; load it again.");
  }
  return answer.json();
}

async function run(form) {
  const { mark, options } = await offer(form);
  const made = form.dataset.passkey === "make"
    ? await navigator.credentials.create({ publicKey: PublicKeyCredential.parseCreationOptionsFromJSON(options) })
    : await navigator.credentials.get({ publicKey: PublicKeyCredential.parseRequestOptionsFromJSON(options) });
  form.elements.credential.value = JSON.stringify(made.toJSON());
  const field = document.createElement("input");
  field.type = "hidden";
  field.name = "mark";
  field.value = mark;
  form.append(field);
  form.submit();
}

for (const form of document.querySelectorAll("form[data-passkey]")) {
  if (!window.PublicKeyCredential || !PublicKeyCredential.parseCreationOptionsFromJSON) continue;
  form.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const problem = form.querySelector("[data-passkey-problem]");
    problem.textContent = "";
    run(form).catch((error) => {
      problem.textContent = error.name === "NotAllowedError" ? "The passkey was not used." : error.message;
    });
  });
}
